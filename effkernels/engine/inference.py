"""`InferenceEngine`: a prepared copy of a model, with one call."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from effkernels.engine.arguments import (
    check_count,
    check_device,
    check_dtype,
    check_elements,
    check_flags,
    check_iterable,
    check_latency,
    check_memory_format,
    check_threads,
)
from effkernels.engine.batcher import MicroBatcher
from effkernels.engine.buckets import checked_sizes
from effkernels.engine.outputs import rows_on_host
from effkernels.engine.prepare import Preparation, check_structure, device_and_dtype_of, structure_of
from effkernels.engine.prepared import PreparedModel, engine_device
from effkernels.engine.preprocess import (
    check_memory,
    check_pixels,
    is_pil_image,
    preprocessing_from,
    to_pixels,
    transform,
)
from effkernels.engine.report import EngineReport, EngineStats
from effkernels.models.model_input import input_size_of
from effkernels.models.preprocessing import Preprocessing


class InferenceEngine:
    """A copy of a model, prepared once and then run at any batch size; safe to call from many threads.

    The copy is in eval mode, optimized and on its device, and the forward of every batch size is recorded once and then
    replayed without its Python: as a CUDA graph on a GPU, on a CPU as calls of effkernels' kernels with those of other
    operators between them. What cannot be recorded, such as a forward whose shapes or branches depend on the values of
    an image, runs as it is, and the report says why. The model that is given
    stays as it is, and `refresh` takes over its weights when they have changed. Work of several threads is done one
    batch after the other.

    The result of an image does not depend on the images beside it in a bucket. Which bucket it is in depends on how
    many there are, and between buckets the last bits may differ where the model's operators do: effkernels' CPU kernels
    give the same bits at any batch size, PyTorch's matrix product of a classifier may not.

    Results are on the engine's device and in memory of their own.

    Args:
        model: takes (N, C, H, W) and returns a tensor, or a tuple, list or dict of tensors, with the batch first.
        dtype: of weights and inputs: float32, bfloat16, float16 or float64; None: the model's.
        memory_format: torch.channels_last, or torch.contiguous_format.
        batch_sizes: buckets to prepare. Other numbers of images are cut into them, the last one padded.
        device: None: the model's.
        cuda_graph: record and replay; False: call the model every time, for a forward with effects of its own.
        input_size: pixels of a square, (height, width) or (channels, height, width); None: what the model's
            configuration says.
        max_latency_ms: how long `submit` lets the first image of a batch wait for others, in milliseconds, at most a
            day.
        max_queue: how many images may wait at once in `submit`; None: 16 of the largest buckets.
        max_memory_bytes: leave out the buckets whose memory bound is above this.
        optimize: call `effkernels.optimize_` on the copy, if the model is not effkernels' own.
        fold_norms: call `effkernels.fold_bn_` on the copy. Fused operators gain nothing by it.
        preprocessing: of `preprocess` and of images in `submit`: `effkernels.predict.Preprocessing`, or an object with
            `image_mean` and `image_std`, such as an image processor of Hugging Face, whose mean and standard deviation
            are taken; None: what the model's configuration says, and what ImageNet models use where it says nothing.
        warm_up: prepare every bucket at once; False: each when it is first needed.
        threads: on a CPU, how many threads compute, or the numbers of the cores to compute on, one thread each. The
            engine then works in a thread of its own, and several engines work side by side without sharing threads;
            with cores that differ, without sharing cores either. None: the threads that PyTorch has in the calling
            thread.

    Attributes:
        report: an `EngineReport`: what was done.
        memory_bound_bytes: the tensors that the engine holds at most while it runs, beside those that go in and come
            out, and photographs: the weights, the activations of the largest bucket, inputs and results of its own.
            Activations are counted in a forward of the smallest and of the largest bucket, without what an operator
            takes for itself and gives back. A GPU's bound is at least what PyTorch's allocator reserved during the
            warm-up. On a CPU every recorded bucket holds its own activations, and that of one image the weights once
            more, packed for the kernels; there allocators round up beyond what is counted.

    Raises:
        TypeError: an argument of another type, a model that cannot be copied, an output that is not made of tensors.
        ValueError: an argument out of its range, an output without the batch first, or max_memory_bytes below what the
            smallest bucket needs; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        batch_sizes: Iterable[int] = (1, 4, 16, 64),
        device: torch.device | str | None = None,
        cuda_graph: bool = True,
        input_size: int | Sequence[int] | None = None,
        max_latency_ms: float = 2.0,
        max_queue: int | None = None,
        max_memory_bytes: int | None = None,
        optimize: bool = True,
        fold_norms: bool = False,
        preprocessing: Preprocessing | Any | None = None,
        warm_up: bool = True,
        threads: int | Iterable[int] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"InferenceEngine: model is {type(model).__name__}; allowed: torch.nn.Module")
        check_flags(cuda_graph=cuda_graph, optimize=optimize, fold_norms=fold_norms, warm_up=warm_up)
        sizes = checked_sizes(check_iterable(batch_sizes))
        max_queue = 16 * sizes[-1] if max_queue is None else check_count("max_queue", max_queue)
        max_latency_ms = check_latency(max_latency_ms)
        if max_memory_bytes is not None:
            check_count("max_memory_bytes", max_memory_bytes)
        check_memory_format(memory_format)
        own_device, own_dtype = device_and_dtype_of(model)
        dtype = check_dtype(own_dtype if dtype is None else dtype)
        device = own_device if device is None else check_device(device)
        own_threads = check_threads(threads, device)
        self._input_size = input_size_of(model, input_size, owner="InferenceEngine")
        check_elements(sizes, self._input_size)
        where = engine_device(device, own_threads)
        self._preprocessing: Preprocessing | None = None
        try:
            self._preprocessing, source = preprocessing_from(preprocessing, model, self._input_size)
        except ValueError as error:
            if preprocessing is not None:
                raise
            # Who brings tensors needs none.
            source = self._no_preprocessing = f"none: {error}"
        self._process = os.getpid()
        self._closed = False
        # The model belongs to its owner: an engine must not keep a second set of weights alive.
        self._source = weakref.ref(model)
        self._structure = structure_of(model)
        self._prepared = PreparedModel(
            model,
            where,
            Preparation(where.device, dtype, memory_format, optimize, fold_norms),
            self._input_size,
            sizes,
            cuda_graph=cuda_graph,
            max_memory_bytes=max_memory_bytes,
        )
        if warm_up:
            self._prepared.work(self._prepared.warm_up)
        self._threads = None if own_threads is None else own_threads[0]
        self._cores = None if own_threads is None else own_threads[1]
        self._identity = (type(model).__name__, str(memory_format).removeprefix("torch."), source)
        self._batcher = MicroBatcher(self._prepared.sizes[-1], max_latency_ms / 1e3, max_queue)
        # When the engine is collected, and before the interpreter ends, while threads still run.
        self._finalizer = weakref.finalize(self, MicroBatcher.close, self._batcher, True, True)

    # ------------------------------------------------------------------------------------------------- running

    def __call__(self, images: Tensor) -> Any:
        """See `run`."""
        return self.run(images)

    def run(self, images: Tensor) -> Any:
        """Return the model's output for a batch of any size.

        Args:
            images: (N, C, H, W) with the engine's C, H and W, in any floating dtype and memory format, on the CPU or on
                the engine's device. It is not needed any more when the call returns.

        Returns:
            The model's structure of tensors with N rows, on the engine's device.

        Raises:
            TypeError: no tensor, or not of a floating dtype.
            ValueError: another shape or device.
            RuntimeError: the engine is closed, or was made in another process.
        """
        self._check_usable("run")
        self._check_images(images, ("N", *map(str, self._input_size)))
        return self._prepared.work(lambda: self._prepared.device.hand_over(self._prepared.run(images)))

    def preprocess(self, images: Any) -> Tensor:
        """Turn photographs into the model's input, computed on the engine's device.

        The shorter side is resized, a central square cut out, mean and standard deviation are taken out per channel: as
        `effkernels.predict.Preprocessing` does with Pillow, within two of 255 levels.

        Args:
            images: uint8 (N, H, W, C) as a tensor or array; or a sequence of images of any sizes, each uint8 (H, W, C)
                or a PIL image.

        Returns:
            (N, C, H, W) on the engine's device, in its dtype, ready for `run`.

        Raises:
            TypeError, ValueError: no such images; the message says which one, and what is allowed.
            OSError: a PIL image that turns out to be damaged.
            RuntimeError: the engine is closed, or was made in another process.
        """
        self._check_usable("preprocess")
        channels = self._input_size[0]
        if is_pil_image(images):
            raise TypeError("preprocess: one PIL image; allowed: a sequence of them")
        preprocessing = self._usable_preprocessing()
        if isinstance(images, (list, tuple)):
            pixels = []
            for index, image in enumerate(images):
                try:
                    pixels.append(to_pixels(image, channels))
                except (TypeError, ValueError, OSError) as error:
                    kind = next(kind for kind in (TypeError, ValueError, OSError) if isinstance(error, kind))
                    raise kind(f"preprocess: image {index}: {error}") from error
            batches = _by_size(pixels)
        else:
            batch = check_pixels(images, channels, "NHWC")
            batches = [(list(range(len(batch))), batch)] if len(batch) else []

        def prepare() -> Tensor:
            result = self._prepared.new_input(sum(len(members) for members, _ in batches))
            for members, batch in batches:
                self._transform_into(result, members, batch, preprocessing)
            prepared: Tensor = self._prepared.device.hand_over(result)
            return prepared

        return self._prepared.work(prepare)

    def submit(self, image: Any, *, block: bool = False) -> Future[Any]:
        """Queue one image; images of many threads are run together.

        A batch starts when it fills the largest bucket, or when its first image has waited max_latency_ms. What is no
        image, or of a wrong shape, fails alone: its future has the exception. With asyncio, wait for
        `asyncio.wrap_future(engine.submit(image))`.

        Args:
            image: a PIL image or uint8 (H, W, C), which is preprocessed; or a floating tensor (C, H, W), which goes to
                the model as it is. It must not change before the future is done.
            block: wait for room when max_queue images are waiting, instead of raising.

        Returns:
            A future of the model's output for this image, without the batch dimension, on the CPU. It may be cancelled
            as long as the image waits.

        Raises:
            QueueFull: max_queue images are waiting.
            RuntimeError: the engine is closed, or was made in another process.
        """
        self._check_usable("submit")
        try:
            if isinstance(image, Tensor) and (image.is_floating_point() or image.is_quantized):
                self._check_images(image, tuple(map(str, self._input_size)))
            else:
                self._usable_preprocessing()
                if not is_pil_image(image):
                    image = check_pixels(image, self._input_size[0], "HWC")
        except (TypeError, ValueError) as error:
            return self._batcher.refuse(error)
        return self._batcher.submit(_Submitted(image, self._prepared.device.moment()), self._answer, block)

    def refresh(self, model: nn.Module | None = None) -> None:
        """Take over the weights of the model after they have changed.

        They are written into the memory where the engine's weights are, so that CUDA graphs stay valid; on a CPU
        the recordings are made anew.

        Args:
            model: None: the one the engine was made with, which its owner still has to hold: the engine keeps only a
                weak reference. Another one must have the same structure.

        Raises:
            ValueError: the structure has changed; the message names the first difference. The engine stays as it was.
            RuntimeError: the model is gone; or the engine is closed, or was made in another process.
        """
        self._check_usable("refresh")
        source = self._source() if model is None else model
        if source is None:
            raise RuntimeError(
                "refresh: the model that the engine was made with no longer exists; give one: refresh(model)"
            )
        check_structure(structure_of(source), self._structure)
        self._prepared.refresh(source)

    # ------------------------------------------------------------------------------------------- its reports

    @property
    def report(self) -> EngineReport:
        """Return what was done to prepare the engine; with `warm_up=False` buckets are prepared as calls need them."""
        prepared = self._prepared
        model, memory_format, preprocessing = self._identity
        return EngineReport(
            model=model,
            device=str(prepared.device.device),
            dtype=str(prepared.dtype).removeprefix("torch."),
            memory_format=memory_format,
            input_size=self._input_size,
            optimized=prepared.optimized,
            norms_folded=prepared.norms_folded,
            preprocessing=preprocessing,
            buckets=prepared.bucket_reports(),
            weight_bytes=prepared.weight_bytes,
            activation_bytes=prepared.activation_bytes(prepared.sizes[-1]),
            buffer_bytes=prepared.buffer_bytes(prepared.sizes[-1]),
            threads=self._threads,
            cores=self._cores,
        )

    @property
    def memory_bound_bytes(self) -> int:
        """See the class."""
        return self._prepared.memory_bound_bytes

    def stats(self) -> EngineStats:
        """Return what the engine has done so far."""
        counts = self._batcher.counts()
        p50, p95, p99 = counts.latency_ms or (None, None, None)
        batches, images, computed = self._prepared.batches, self._prepared.images, self._prepared.rows
        return EngineStats(
            batches=batches,
            images=images,
            mean_fill=images / computed if computed else None,
            requests=counts.requests,
            completed=counts.completed,
            failed=counts.failed,
            cancelled=counts.cancelled,
            pending=counts.pending,
            rejected=counts.rejected,
            latency_p50_ms=p50,
            latency_p95_ms=p95,
            latency_p99_ms=p99,
        )

    # ------------------------------------------------------------------------------------------------ the end

    def close(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Take no more work; calling it again does nothing. It also happens when the interpreter ends.

        Args:
            wait: return when the images that `submit` took are answered, and give the memory back.
            cancel_futures: cancel the images that wait instead of answering them.
        """
        self._closed = True
        self._batcher.close(wait, cancel_futures)
        if wait and os.getpid() == self._process and not self._batcher.is_own_thread():
            self._prepared.release()

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "InferenceEngine cannot be pickled or copied: it holds a thread, locks and, on a GPU, CUDA graphs. Pickle "
            "the model, and make an engine in the process that uses it"
        )

    # ------------------------------------------------------------------------------------------------ the work

    def _answer(self, submitted: Sequence[_Submitted]) -> list[Any]:
        """Return for every image its result, or the exception of that image alone; called by the batcher's thread."""
        answers: list[Any] = []
        for request in submitted:
            try:
                is_input = isinstance(request.image, Tensor) and request.image.is_floating_point()
                answers.append(request.image if is_input else to_pixels(request.image, self._input_size[0]))
            except Exception as error:  # one of Pillow's many, for a damaged image, which has to fail alone
                answers.append(error)
        good = [index for index, answer in enumerate(answers) if isinstance(answer, Tensor)]
        if not good:
            return answers

        def compute() -> dict[int, Any]:
            for index in good:
                self._prepared.device.wait_for(submitted[index].moment)
            images = self._prepared.new_input(len(good))
            given = [answers[index] for index in good]
            found: dict[int, Any] = {}
            for members in _of_one_size(given):
                found |= self._write_inputs(images, members, given)
            # On the CPU no stream has to be waited for: whoever has the future may use the result at once.
            return dict(enumerate(rows_on_host(self._prepared.run(images)))) | found

        for row, result in self._prepared.work(compute).items():
            answers[good[row]] = result
        return answers

    def _write_inputs(self, images: Tensor, members: list[int], given: list[Tensor]) -> dict[int, Exception]:
        """Write images of one size into their rows of `images`, inside of `PreparedModel.work`; errors by row."""
        try:
            batch = torch.stack([given[member] for member in members])
            if batch.is_floating_point():
                _write(images, members, self._prepared.device.bring(batch, self._prepared.dtype))
            else:
                self._transform_into(images, members, batch, self._usable_preprocessing())
        except Exception as error:
            if len(members) == 1:
                return {members[0]: error}
            return {row: why for one in members for row, why in self._write_inputs(images, [one], given).items()}
        return {}

    def _transform_into(self, images: Tensor, members: list[int], pixels: Tensor, how: Preprocessing) -> None:
        """Write what uint8 (N, H, W, C) becomes into those rows of `images`; inside of `PreparedModel.work`."""
        _write(images, members, transform(self._prepared.device.bring(pixels, torch.uint8), how))

    def _usable_preprocessing(self) -> Preprocessing:
        if self._preprocessing is None:
            raise ValueError(
                f"preprocess: {self._no_preprocessing}; give InferenceEngine(preprocessing=...), or tensors"
            )
        return self._preprocessing

    def _check_images(self, images: Any, wanted: tuple[str, ...]) -> None:
        allowed = f"a floating tensor ({', '.join(wanted)})"
        if not isinstance(images, Tensor):
            raise TypeError(f"images are {type(images).__name__}; allowed: {allowed}")
        check_memory(images, "images")
        if not images.is_floating_point():
            raise TypeError(f"images have dtype {images.dtype}; allowed: {allowed}; photographs go through preprocess")
        if images.dim() != len(wanted) or tuple(images.shape[-3:]) != self._input_size:
            raise ValueError(f"images have shape {tuple(images.shape)}; allowed: {allowed}")
        if images.device.type != "cpu" and images.device != self._prepared.device.device:
            raise ValueError(f"images are on {images.device}; allowed: cpu and {self._prepared.device.device}")

    def _check_usable(self, name: str) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"{name}: the engine was made in process {self._process} and this is process {os.getpid()}; its thread "
                "and a GPU do not survive a fork. Make an engine here"
            )
        if self._closed:
            raise RuntimeError(f"{name}: the engine is closed")


@dataclass(frozen=True)
class _Submitted:
    """An image, and the moment at which it is ready on its device."""

    image: Any
    moment: Any


def _by_size(images: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Stack tensors of the same shape, dtype and device to batches, each with their positions in `images`."""
    return [(members, torch.stack([images[index] for index in members])) for members in _of_one_size(images)]


def _of_one_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of tensors that can be stacked: of the same shape, dtype and device."""
    groups: dict[Any, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape, image.dtype, image.device), []).append(index)
    return list(groups.values())


def _write(images: Tensor, members: list[int], values: Tensor) -> None:
    """images[members] = values, in one copy if the members are consecutive."""
    first = members[0]
    if members == list(range(first, first + len(members))):
        images[first : first + len(members)].copy_(values)
        return
    for member, value in zip(members, values, strict=True):
        images[member].copy_(value)

"""The prepared model with its buckets: what computes, and what it costs in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effkernels._recorded_tensor import NotRecordableError
from effkernels.engine.buckets import buckets_for
from effkernels.engine.devices import EngineDevice, HostDevice, Result
from effkernels.engine.memory import model_tensors, peak_bytes, storage_bytes
from effkernels.engine.outputs import check_output, concatenated, first_rows, nbytes
from effkernels.engine.prepare import Preparation, new_weights, prepare
from effkernels.engine.report import BucketReport
from effkernels.engine.runners import EagerRunner, GraphRunner, Runner
from effkernels.engine.worker import Worker


class PreparedModel:
    """A prepared copy of a model and a runner for each bucket.

    `work` takes the lock; everything that computes is called inside of it.

    Args:
        model: copied.
        device: where to work.
        how: what to do to the copy.
        input_size: (channels, height, width).
        sizes: of the buckets, rising.
        cuda_graph, max_memory_bytes: as of `InferenceEngine`.

    Attributes:
        sizes: of the buckets there is room for, rising.

    Raises:
        TypeError, ValueError: as `InferenceEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: EngineDevice,
        how: Preparation,
        input_size: tuple[int, int, int],
        sizes: tuple[int, ...],
        *,
        cuda_graph: bool,
        max_memory_bytes: int | None,
    ) -> None:
        self.device = device
        self.dtype = how.dtype
        self.input_size = input_size
        self.sizes = sizes
        self.batches = self.images = self.rows = 0
        self._how = how
        self._lock = threading.RLock()
        self._released = False
        self._runners: dict[int, Runner] = {}
        self._reserved_bytes = 0
        self._eager_because = "" if cuda_graph else "cuda_graph=False"
        if device.capture is None:
            self._eager_because = f"nothing can be recorded on {device.device} here"
        prepared = prepare(model, how)
        self._model = prepared.model
        self.optimized = prepared.optimized
        self.norms_folded = prepared.norms_folded
        self.weight_bytes = storage_bytes(model_tensors(self._model).values())
        self.work(lambda: self._measure(max_memory_bytes))

    def work(self, job: Callable[[], Result]) -> Result:
        """Call `job` in this thread while no other one works with the model.

        It runs in inference mode and without autocast: the engine's dtype holds wherever it is called.

        Raises:
            RuntimeError: `release` was called.
        """
        # After an interrupt neither the lock nor a mode may remain held. Between a call of C and what comes next Python
        # looks for none; the context managers of torch and contextlib are Python, and are left by those of C here.
        device = self.device.device.type
        with self._lock:
            if self._released:
                raise RuntimeError("the engine is closed")
            with_autocast = torch.is_autocast_enabled(device)
            try:
                if with_autocast:
                    torch.set_autocast_enabled(device, False)
                with torch._C._InferenceMode(True):
                    return self.device.work(job)
            finally:
                if with_autocast:
                    torch.set_autocast_enabled(device, True)

    def new_input(self, count: int) -> Tensor:
        """Return zeros for that many images, (count, C, H, W)."""
        shape = (count, *self.input_size)
        memory_format = self._how.memory_format
        with torch._C._InferenceMode(False), torch.no_grad():
            new = torch.empty(shape, dtype=self.dtype, device=self.device.device, memory_format=memory_format)
            return new.zero_()

    def run(self, images: Tensor) -> Any:
        """Return the output for (N, C, H, W) of any N; rows of 0 for N=0."""
        if len(images) == 0:
            return first_rows(self._no_rows, 0)
        parts, start = [], 0
        for size in buckets_for(len(images), self.sizes, self.device.overhead):
            part = images[start : start + size]
            parts.append(self._run_bucket(size, self.device.bring(part, self.dtype)))
            start += size
            self.batches += 1
            self.images += len(part)
            self.rows += size
        return concatenated(parts)

    def warm_up(self) -> None:
        """Prepare every bucket, the largest first: the smaller ones then find its memory to use again."""
        before = self.device.reserved_bytes()
        weights = list(model_tensors(self._model).values())
        for size in reversed(self.sizes):
            runner, images = self._runner(size), self.new_input(size)
            if size == self.sizes[-1] and (runner.kind == "eager" or not self.device.recordings_share):
                run = runner.run if runner.kind == "eager" else self._model
                output, self._measured[size] = peak_bytes(run, images, weights)
            else:
                output = runner.run(images)
            check_output(output, size)
        self.device.synchronize()
        self._reserved_bytes = self.device.reserved_bytes() - before

    def refresh(self, source: nn.Module) -> None:
        """Write the weights of a model of the same structure into the memory of this one's: all of them or none.

        Raises:
            ValueError: one of them cannot be taken over; the message names it.
        """
        if self._how.fold_norms:  # folded weights are of another form: fold the new ones as well
            source = prepare(source, self._how).model
        self.work(lambda: self._take_over(source))

    def _take_over(self, source: nn.Module) -> None:
        into, values = new_weights(source, self._model)
        # From here on nothing fails, and an interrupt finds either all of the old weights or all of the new ones.
        if not self.device.recordings_share:
            self._runners.clear()
        with torch._C._InferenceMode(False), torch.no_grad():
            torch._foreach_copy_(into, values)

    def release(self) -> None:
        """Give weights and graphs back."""
        with self._lock:
            self._released = True
            self.device.synchronize()
            self._runners.clear()
            self._model = nn.Module()
            self.device.close()

    # -------------------------------------------------------------------------------------------------- memory

    @property
    def memory_bound_bytes(self) -> int:
        """Return the most bytes held: computed, and on a GPU at least what the allocator reserved while warming up."""
        return max(self.bound(self.sizes[-1]), self.weight_bytes + self._reserved_bytes)

    def bound(self, size: int) -> int:
        """Weights, activations and buffers in bytes with that bucket as the largest."""
        held = self.weight_bytes + self.activation_bytes(size) + self.buffer_bytes(size)
        if not self._eager_because and not self.device.recordings_share:
            held += sum(self._recorded_bytes(one) for one in self.sizes if one <= size)
        return held

    def _recorded_bytes(self, size: int) -> int:
        """Return the bytes that a bucket's recording holds: known, or in proportion to the smallest bucket's."""
        runners = self._runners.copy()  # in one step: another thread may add one meanwhile
        recorded = {one: runner.recorded for one, runner in runners.items() if isinstance(runner, GraphRunner)}
        if size in recorded:
            return recorded[size].result_bytes + recorded[size].weight_bytes
        smallest = min(recorded, default=size)
        return -(-recorded[smallest].result_bytes * size // smallest) if recorded else 0

    def activation_bytes(self, size: int) -> int:
        """Return the most bytes of tensors alive at once in a forward: counted, or scaled from the smallest bucket."""
        measured = self._measured.copy()
        if size in measured:
            return measured[size]
        smallest = min(measured)
        return -(-measured[smallest] * size // smallest)

    def buffer_bytes(self, size: int) -> int:
        """Inputs and results beside a forward: padded or copied out, and on a GPU those of every graph."""
        held = 0 if self._eager_because else sum(one for one in self.sizes if one <= size)
        return (held + size) * self._bytes_per_image

    def bucket_reports(self) -> tuple[BucketReport, ...]:
        """Return how every batch size asked for was prepared."""
        reports = []
        for size in sorted({*self.sizes, *self._refused}):
            runner = self._runners.get(size)
            if size in self._refused:
                kind, reason = "refused", self._refused[size]
            elif runner is None:
                kind, reason = "not prepared", "no call has needed it yet"
            else:
                kind, reason = runner.kind, self._eager_because if runner.kind == "eager" else ""
            reports.append(BucketReport(size, kind, reason, self.bound(size)))
        return tuple(reports)

    def _measure(self, limit: int | None) -> None:
        """Run the smallest bucket: what the model returns, what an image needs, and which buckets there is room for."""
        smallest = self.sizes[0]
        images = self.new_input(smallest)
        output, activations = peak_bytes(self._model, images, list(model_tensors(self._model).values()))
        check_output(output, smallest)
        self._no_rows = first_rows(output, 0)
        self._measured = {smallest: activations}
        self._bytes_per_image = -(-(images.nbytes + nbytes(output)) // smallest)
        if (
            not self.device.recordings_share and self._runner(smallest).kind == "eager"
        ):  # a recording shows what it holds
            self._runners.clear()
        self._refused = {
            size: f"above max_memory_bytes={limit}"
            for size in self.sizes
            if limit is not None and self.bound(size) > limit
        }
        if len(self._refused) == len(self.sizes):
            raise ValueError(
                f"InferenceEngine: max_memory_bytes={limit}, and a batch of {smallest} needs {self.bound(smallest)} "
                "bytes; allow more, or give a smaller size in batch_sizes"
            )
        self.sizes = tuple(size for size in self.sizes if size not in self._refused)

    # ------------------------------------------------------------------------------------------------- runners

    def _runner(self, size: int) -> Runner:
        """Return the runner of a bucket, made where there is none yet."""
        if size not in self._runners:
            self._runners[size] = self._new_runner(size)
        return self._runners[size]

    def _run_bucket(self, size: int, images: Tensor) -> Any:
        runner = self._runner(size)
        try:
            return runner.run(images)
        except Exception as error:
            if not isinstance(runner, GraphRunner) or self.device.recordings_share:
                raise
            # The model has the last word on what these images are worth: a result, or an error of its own.
            eager = EagerRunner(self._model, size, self._how.memory_format)
            output = eager.run(images)
            if isinstance(error, NotRecordableError):
                self._eager_because = f"replay failed: {error}"
                self._runners = {size: eager}
            return output

    def _new_runner(self, size: int) -> Runner:
        capture = self.device.capture
        if capture is not None and not self._eager_because:
            try:
                return GraphRunner(self._model, self.new_input(size), capture, self.device.recording)
            except Exception as error:
                # A model that waits for the GPU, reads values back or makes tensors on the host cannot be recorded. It
                # still runs.
                reason = " ".join(str(error).split())
                self._eager_because = f"recording failed: {type(error).__name__}: {reason}"
        return EagerRunner(self._model, size, self._how.memory_format)


def engine_device(device: torch.device, threads: tuple[int, tuple[int, ...] | None] | None = None) -> EngineDevice:
    """Return the engine's interface to a device, with threads of its own on a CPU where they are asked for.

    Raises:
        OSError: the system does not pin threads to those cores.
        ValueError: a GPU that PyTorch does not see, or the meta device.
    """
    if device.type == "meta":
        raise ValueError(f"InferenceEngine: device={device} holds no values; allowed: a device that computes")
    if device.type != "cuda":
        return HostDevice(device, None if threads is None else Worker(*threads))
    if not torch.cuda.is_available():
        raise ValueError(f"InferenceEngine: device={device}, but PyTorch {torch.__version__} sees no GPU")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"InferenceEngine: device={device}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    from effkernels.engine.cuda import CudaDevice

    return CudaDevice(device)

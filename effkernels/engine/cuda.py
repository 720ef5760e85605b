"""All of an engine that needs a GPU: its stream, the recording of CUDA graphs, and uploads from the host."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effkernels.engine.devices import Result
from effkernels.engine.outputs import map_tensors
from effkernels.engine.runners import Capture, Forward, Recorded

# Before a capture a call runs this often: libraries choose their algorithms, Triton compiles, buffers are allocated.
_WARM_UP_CALLS = 3
_SLOTS = 2
# PyTorch records one graph at a time in a process.
_RECORDING = threading.Lock()


class CudaDevice:
    """A GPU with a stream of the engine's own, on which everything it computes is in order.

    All graphs take their memory from one pool. They may, because they are replayed on one stream, and because each
    graph's results are held by its runner: only what is dead after a replay is used again by another graph.

    Args:
        cuda: `torch.cuda`, or a test's replacement for it.
    """

    # EfficientNet-B0 in bfloat16: the design's aims of 90 to 150 us for a replay of one image and of 10 us an image at
    # batch 256. `effkernels bench` on a GPU gives the numbers of that machine.
    overhead = 12.0
    recording = "cuda graph"
    recordings_share = True

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self.device = torch.device("cuda", cuda.current_device()) if device.index is None else device
        self._stream: Any = cuda.Stream(self.device)
        self._pool: Any = cuda.graph_pool_handle()
        self._uploads = Uploads(self.device, self._stream, cuda)

    @property
    def capture(self) -> Capture | None:
        """See `EngineDevice`."""
        return self._capture

    def work(self, job: Callable[[], Result]) -> Result:
        """See `EngineDevice`."""
        caller = self._cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        self._caller = caller
        try:
            with self._cuda.stream(self._stream):  # makes its device the current one, too
                return job()
        finally:
            caller.wait_stream(self._stream)

    def bring(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `EngineDevice`."""
        if tensor.device.type == "cpu":
            return self._uploads.upload(tensor, dtype)
        tensor.record_stream(self._stream)
        return tensor.to(dtype)

    def hand_over(self, output: Any) -> Any:
        """See `EngineDevice`."""

        def used_by_caller(tensor: Tensor) -> Tensor:
            tensor.record_stream(self._caller)
            return tensor

        return map_tensors(output, used_by_caller)

    def moment(self) -> Any:
        """See `EngineDevice`."""
        return self._cuda.current_stream(self.device).record_event()

    def wait_for(self, moment: Any) -> None:
        """See `EngineDevice`."""
        self._stream.wait_event(moment)

    def synchronize(self) -> None:
        """See `EngineDevice`."""
        self._stream.synchronize()

    def reserved_bytes(self) -> int:
        """See `EngineDevice`."""
        reserved: int = self._cuda.memory_reserved(self.device)
        return reserved

    def close(self) -> None:
        """See `EngineDevice`."""

    def _capture(self, forward: Forward, images: Tensor) -> Recorded:
        for _ in range(_WARM_UP_CALLS):
            forward(images)
        self._stream.synchronize()
        graph = self._cuda.CUDAGraph()
        # "thread_local": what other threads of the process do on the GPU meanwhile does not break the recording.
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            with _RECORDING, self._cuda.graph(graph, **how):
                output = forward(images)
        except BaseException:
            self._end_allocations()
            raise
        return Recorded(graph.replay, output)

    def _end_allocations(self) -> None:
        """Report to the allocator that a recording ended in an error.

        PyTorch does so only where it ended well. For as long as the allocator believes in a recording, it keeps every
        tensor with `record_stream` that is freed, as those of each call are, and memory grows without end.
        """
        with contextlib.suppress(RuntimeError):  # it knows of none: the recording had not begun, or PyTorch ended it
            self._cuda.memory._cuda_endAllocateToPool(self.device.index, self._pool)


class _Slot:
    """Page-locked memory that grows to the largest upload, and when the last copy out of it is done."""

    def __init__(self, cuda: Any, pinned: bool) -> None:
        self._pinned = pinned
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.emptied = cuda.Event()

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor in this memory with the shape of another one, and its strides where those leave no gaps."""
        layout = torch.empty_like(tensor, dtype=dtype, device="meta")
        if self._memory.numel() < layout.nbytes:
            self._memory = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        flat = self._memory[: layout.nbytes].view(dtype)
        return flat.as_strided(layout.shape, layout.stride())


class Uploads:
    """Copies from the host that overlap with the work on the GPU.

    A tensor is copied, and converted, into one of two page-locked buffers and from there on a stream of its own, so
    that the next one can be on its way while the last one is computed on. The host waits only for the copy before the
    last. The tensor that was given is not needed any more when `upload` returns.

    Args:
        device: where to.
        stream: on which the copies are used.
        cuda: `torch.cuda`, or a test's replacement for it.
    """

    def __init__(self, device: torch.device, stream: Any, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._user = stream
        self._cuda = cuda
        self._stream = cuda.Stream(device)
        self._slots = [_Slot(cuda, pinned=device.type == "cuda") for _ in range(_SLOTS)]
        self._next = 0

    def upload(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of a host tensor on the device, ready for whatever comes next on the stream that uses it."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.emptied.synchronize()
        staged = slot.like(tensor, dtype)
        staged.copy_(tensor)
        with self._cuda.stream(self._stream):
            uploaded = torch.empty_like(staged, device=self._device)
            uploaded.copy_(staged, non_blocking=True)
            slot.emptied.record(self._stream)
        self._user.wait_event(slot.emptied)
        # Its memory belongs to the stream of the copies and may be used again there only after the work that reads it.
        uploaded.record_stream(self._user)
        return uploaded

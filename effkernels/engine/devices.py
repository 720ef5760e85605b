"""Devices that an engine works on. `EngineDevice` is what it needs of one; a GPU's is in `cuda.py`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from effkernels import _library
from effkernels._recorded_tensor import NotRecordableError
from effkernels.engine.cpu_recording import Recording, trial_images
from effkernels.engine.outputs import map_tensors, same_values
from effkernels.engine.runners import Capture, Forward, Recorded
from effkernels.engine.worker import Worker

Result = TypeVar("Result")


class EngineDevice(Protocol):
    """A device, the order of work on it, and the ways of tensors to and from it."""

    device: torch.device
    # What one more call costs beside its images, in images: decides how a batch is cut.
    overhead: float
    recording: str  # what a recorded call is named in reports
    # Whether recordings take their memory from one pool. Otherwise each holds its own, and the weights in another form,
    # so that new weights need new recordings.
    recordings_share: bool

    @property
    def capture(self) -> Capture | None:
        """Records a call for `GraphRunner`; None if the device has nothing like it."""

    def work(self, job: Callable[[], Result]) -> Result:
        """Call `job`, whose work comes after the caller's so far, and before what the caller does next."""

    def bring(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the tensor on this device in that dtype; inside of `work`."""

    def hand_over(self, output: Any) -> Any:
        """Return the output, made safe to use where the caller works; inside of `work`."""

    def moment(self) -> Any:
        """Mark the end of all work that the caller has asked of this device so far."""

    def wait_for(self, moment: Any) -> None:
        """Let the work that follows come after a `moment`, of whatever thread; inside of `work`."""

    def synchronize(self) -> None:
        """Wait until all work of the engine is done."""

    def reserved_bytes(self) -> int:
        """Return the bytes taken from the device: by PyTorch's allocator on a GPU, by recordings on a CPU."""

    def close(self) -> None:
        """Give back what `work` needs."""


class HostDevice:
    """The CPU, and every device that needs no streams of its own.

    Args:
        device: its name.
        worker: the thread that works; None: each caller's own.
    """

    recording = "recorded"
    recordings_share = False
    # EfficientNet-B0, float32, two threads, recorded: 4.7 ms for one image, 49.8 ms for 16; so a call costs half an
    # image, and rounding up lets ties go to fewer calls.
    overhead = 1.0

    def __init__(self, device: torch.device, worker: Worker | None = None) -> None:
        self.device = device
        self._worker = worker
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    @property
    def capture(self) -> Capture | None:
        """See `EngineDevice`."""
        return self._capture if self.device.type == "cpu" and _library.is_loaded() else None

    def work(self, job: Callable[[], Result]) -> Result:
        """See `EngineDevice`."""
        return job() if self._worker is None else self._worker.run(job)

    def close(self) -> None:
        """See `EngineDevice`."""
        if self._worker is not None:
            self._worker.close()

    def bring(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `EngineDevice`."""
        return tensor.to(self.device, dtype)

    def hand_over(self, output: Any) -> Any:
        """See `EngineDevice`."""
        return output

    def moment(self) -> Any:
        """See `EngineDevice`."""

    def wait_for(self, moment: Any) -> None:
        """See `EngineDevice`."""

    def synchronize(self) -> None:
        """See `EngineDevice`."""

    def reserved_bytes(self) -> int:
        """See `EngineDevice`."""
        return sum(recording.result_bytes + recording.weight_bytes for recording in self._recordings)

    def _capture(self, forward: Forward, images: Tensor) -> Recorded:
        recording = Recording(forward, images)
        # What changes from one call to the next (random numbers, state in Python) shows when it is tried.
        for values in trial_images(images):
            images.copy_(values)
            wanted = map_tensors(forward(images), Tensor.clone)
            images.copy_(values)  # a forward may write to its input
            recording.replay()
            if not same_values(recording.output, wanted):
                raise NotRecordableError("its replay gives another result")
        images.zero_()
        self._recordings.add(recording)
        return Recorded(recording.replay, recording.output, recording.result_bytes, recording.weight_bytes)

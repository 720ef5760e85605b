"""Runners compute one bucket each: a runner takes up to `batch` images and returns only their results.

A runner is called by one thread at a time, under `torch.inference_mode()`. What it returns is the caller's: it shares
no memory with anything that a later call writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from effkernels.engine.outputs import first_rows

Forward = Callable[[Tensor], Any]


class Recorded(NamedTuple):
    """A call that can be repeated.

    Attributes:
        replay: does it again.
        output: what it returned: the same tensors, which every repetition overwrites.
        result_bytes, weight_bytes: memory that only this one holds, for what it computes and for copies of weights.
    """

    replay: Callable[[], None]
    output: Any
    result_bytes: int = 0
    weight_bytes: int = 0


# Records what a forward does to a tensor, which it may overwrite.
Capture = Callable[[Forward, Tensor], Recorded]


class Runner(Protocol):
    """Computes a bucket."""

    @property
    def kind(self) -> str:
        """ "eager", or the name of a recorded call."""

    def run(self, images: Tensor) -> Any:
        """Return the model's output for (n, C, H, W), 1 <= n <= batch: n rows."""


class EagerRunner:
    """Calls the model.

    Args:
        forward: the model.
        batch: what every call is padded to, with zeros.
        memory_format: of what the model gets.
    """

    kind = "eager"

    def __init__(self, forward: Forward, batch: int, memory_format: torch.memory_format) -> None:
        self._forward = forward
        self._batch = batch
        self._memory_format = memory_format

    def run(self, images: Tensor) -> Any:
        """See `Runner.run`."""
        count = len(images)
        if count == self._batch:
            given = images.contiguous(memory_format=self._memory_format)
        else:
            given = torch.empty(
                (self._batch, *images.shape[1:]),
                dtype=images.dtype,
                device=images.device,
                memory_format=self._memory_format,
            )
            given[:count].copy_(images)
            given[count:].zero_()
        return first_rows(self._forward(given), count)


class GraphRunner:
    """Replays one recorded call: copies the images into its own input, replays, copies the results out.

    Args:
        forward: the model; it reads its weights in place, so that every replay sees new values.
        images: the input, (batch, C, H, W), which the runner keeps and writes.
        capture: records the call; `EngineDevice.capture`.
        kind: `EngineDevice.recording`.

    Raises:
        Exception: whatever `capture` raises where the call cannot be recorded.
    """

    def __init__(self, forward: Forward, images: Tensor, capture: Capture, kind: str) -> None:
        self.kind = kind
        self._input = images
        self.recorded = capture(forward, images)

    def run(self, images: Tensor) -> Any:
        """See `Runner.run`."""
        count = len(images)
        self._input[:count].copy_(images)
        self._input[count:].zero_()  # no image of an earlier call remains
        self.recorded.replay()
        return first_rows(self.recorded.output, count)

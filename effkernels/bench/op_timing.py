"""Tools to time one operator, beyond `timing`: copied inputs, calls in CUDA graphs, counted launches of Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effkernels import triton
from effkernels.bench import timing


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with tensors of their own, those of four dimensions in channels_last memory.

    So are the weights of a module that was moved to channels_last, which is what PyTorch is fastest with.
    """

    def copy(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.channels_last if t.ndim == 4 else torch.preserve_format)

    return {name: copy(a) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def in_graph(calls: Sequence[Callable[[], object]], device: torch.device, pool: Any = None) -> Callable[[], None]:
    """Return all calls, one after the other, as one CUDA graph.

    Args:
        pool: memory that graphs share whose results nobody reads: torch.cuda.graph_pool_handle().
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    return graph.replay


def as_run(calls: Sequence[Callable[[], object]], device: torch.device, pool: Any = None) -> timing.Run:
    """Return a contender of `time_in_turns`: on a GPU all calls in one graph, elsewhere one after the other."""
    if device.type == "cuda":
        replay = in_graph(calls, device, pool)
        return lambda number: replay()
    return lambda number: calls[number % len(calls)]()


@contextmanager
def temporary_graphs() -> Iterator[None]:
    """Free what Triton's kernels keep for CUDA graphs captured in the block, which are not replayed after it.

    A run that captures thousands of graphs would use up the memory.
    """
    if not triton.INSTALLED:
        yield
        return
    from effkernels.triton import _launch

    with _launch.temporary_graphs():
        yield


@contextmanager
def triton_launches(launch: bool = True) -> Iterator[list[str]]:
    """The names of the Triton kernels launched inside the block, in order; with ``launch`` False none is started."""
    if not triton.INSTALLED:
        yield []
        return
    from effkernels.triton import _launch

    names: list[str] = []
    run = _launch.run

    def counted(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        if launch:
            run(kernel, *args, **options)

    _launch.run = counted
    try:
        yield names
    finally:
        _launch.run = run


def largest_difference(result: Tensor, period: int) -> float:
    """Return how far images are from the equal ones at the start of a result, `period` of them; NaN if any has one."""
    largest = result.new_zeros((), dtype=torch.float32)
    for start in range(period, len(result), period):
        repeated = result[start : start + period].float()
        largest = torch.maximum(largest, (repeated - result[: len(repeated)].float()).abs().max())
    return float(largest)

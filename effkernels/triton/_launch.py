"""Launch kernels, on a GPU or interpreted, with what every launch needs: layouts, alignment, counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from effkernels._norm import Norm
from effkernels.triton import INTERPRETED, tuned_plan

_FEWEST_COUNTERS = 4096  # of a stream: 16 KB
_COUNTERS_FOR_GRAPHS = 1 << 20  # of a device: 4 MB


def run(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 1, **constants: Any
) -> None:
    """Launch `kernel` on the device of its first argument, on the current stream of that device.

    The one place that launches, so that tests can compile a launch, or count it, instead.
    """
    device: torch.device = args[0].device
    if device.type != "cuda":
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    with torch.cuda.device(device):  # Triton launches on the current device, wherever the tensors are
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)


def tuned(
    op: str, x: Tensor, shape: tuple[int, ...], candidates: Callable[[], Sequence[tuned_plan.Choice]]
) -> tuned_plan.Choice | None:
    """Return the configuration that `effkernels tune` found for `op` on this device and dtype; None: the default."""
    return tuned_plan.configuration(op, x.device, x.dtype, shape, candidates)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n, for n at least 1."""
    return 1 << (n - 1).bit_length()


def divide_up(a: int, b: int) -> int:
    return -(-a // b)


def vector_of(dtype: torch.dtype) -> int:
    """Return the number of elements in one 16-byte access."""
    return 16 // dtype.itemsize


def channels_last(x: Tensor) -> Tensor:
    """Return x itself if the channels of a pixel are adjacent, else a channels_last copy of it."""
    if x.shape[1] == 1 or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def image_strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of images, rows and pixels in elements; 0 along an axis of size 1, whose stride is free."""
    n, h, w = (0 if x.shape[axis] == 1 else x.stride(axis) for axis in (0, 2, 3))
    return n, h, w


def vectors_fit(channels: int, *images: Tensor) -> bool:
    """Return whether every pixel of every image begins at a multiple of 16 bytes and holds a whole number of them."""
    return all(
        channels % vector_of(t.dtype) == 0
        and t.data_ptr() % 16 == 0
        and all(stride % vector_of(t.dtype) == 0 for stride in image_strides(t))
        for t in images
    )


def is_wide(*images: Tensor) -> bool:
    """Return whether offsets inside one image, or inside a run of pixels that a block may overshoot, need 64 bits."""
    return any(
        abs(stride) * size >= 1 << 30
        for t in images
        for stride, size in zip(image_strides(t)[1:], t.shape[2:], strict=True)
    )


def activation_for(activation: str, dtype: torch.dtype) -> str:
    """Return the name for _common.activate if the result is rounded to `dtype`: silu has a faster way in 16 bits, whose
    instruction NVIDIA's GPUs have and the interpreter has not.
    """
    fast = activation == "silu" and dtype.itemsize == 2 and not INTERPRETED and torch.version.hip is None
    return "silu_by_tanh" if fast else activation


def dense(t: Tensor | None) -> Tensor | None:
    """Return a parameter with adjacent elements, in order."""
    return None if t is None else t.contiguous()


def dense_norm(norm: Norm | None) -> tuple[Tensor | None, ...]:
    """Mean, variance, weight and bias of a norm, as the kernels take them."""
    return (None,) * 4 if norm is None else tuple(map(dense, norm[:-1]))


def eps_of(norm: Norm | None) -> float:
    """Return the eps that the kernels take beside `dense_norm`."""
    return 0.0 if norm is None else norm.eps


# By device index and stream: never handed back, so that a stream has the same ones for as long as it lives. Those of a
# captured launch come from the device's store for graphs, which no two captures share a part of.
_of_stream: dict[tuple[int, int], Tensor] = {}
_for_graphs: dict[int, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Return `count` int32 counters that are zero, for a kernel that leaves them at zero.

    Launches of one stream run one after another and share theirs. A launch captured into a CUDA graph may be replayed
    beside anything, and therefore gets counters of its own. They come from a store that is filled before the first
    capture (a graph says nothing to Python at its end, so they do not come back); once it is used up, or where nothing
    ran before the capture, the graph fills its own at each replay.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    with torch.cuda.device(index):
        store = _for_graphs.get(index)
        if torch.cuda.is_current_stream_capturing():
            if store is None or store.numel() < count:
                return torch.zeros(count, dtype=torch.int32, device=device)
            _for_graphs[index] = store[count:]
            return store[:count]
        if store is None:
            _for_graphs[index] = torch.zeros(_COUNTERS_FOR_GRAPHS, dtype=torch.int32, device=device)
            torch.cuda.current_stream().synchronize()  # zero on every stream from here on
        key = (index, torch.cuda.current_stream().cuda_stream)
        own = _of_stream.get(key)
        if own is None or own.numel() < count:
            own = torch.zeros(max(_FEWEST_COUNTERS, next_power_of_2(count)), dtype=torch.int32, device=device)
            _of_stream[key] = own
        return own


@contextmanager
def temporary_graphs() -> Iterator[None]:
    """Return the counters of CUDA graphs to the stores: those captured inside the block are not replayed after it."""
    before = dict(_for_graphs)
    try:
        yield
    finally:
        _for_graphs.update(before)


__all__ = [
    "INTERPRETED",
    "activation_for",
    "channels_last",
    "counters",
    "dense",
    "dense_norm",
    "divide_up",
    "eps_of",
    "image_strides",
    "is_wide",
    "next_power_of_2",
    "run",
    "temporary_graphs",
    "tuned",
    "vector_of",
    "vectors_fit",
]

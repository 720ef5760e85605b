"""Shape functions of the compiled training kernels, which `training_steps.py` calls.

A trace never meets them inside of the operators of `training.py`, which are opaque to it; they are for whoever calls
the kernels by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels import _library


def _vectors(t: Tensor, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.new_empty(t.shape[3], dtype=dtype) for _ in range(count)]


def _statistics(t: Tensor) -> tuple[Tensor, ...]:
    return tuple(_vectors(t, 2))


def _like_t(t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape)


def _squeeze(t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape[0], t.shape[3], dtype=torch.float64)


def _gradient_sums(g: Tensor, t: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return t.new_empty(6, t.shape[0], t.shape[3], dtype=torch.float64), t.new_empty(t.shape if settings[-1] else 0)


def _norm_backward(dy: Tensor, t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape)


def _depthwise(t: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    weight, _, stride, padding = arguments[5:]
    return t.new_empty(t.shape[0], *_size_after(t, weight, stride, padding), t.shape[3]), *_vectors(t, 2)


def _depthwise_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, mean, weight = arguments[12], arguments[13], arguments[18]
    sums = t.new_empty(0 if mean is None else 2, t.shape[3], dtype=torch.float64)
    return t.new_empty(t.shape), weight.new_empty(weight.shape, dtype=torch.float32), sums


def _size_after(t: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> list[Any]:
    sizes = zip(t.shape[1:3], weight.shape[2:], (sum(padding[:2]), sum(padding[2:])), strict=True)
    return [(size + pads - kernel) // stride + 1 for size, kernel, pads in sizes]


if _library.is_loaded():
    for _name, _fake in (
        ("statistics", _statistics),
        ("norm_act", _like_t),
        ("squeeze", _squeeze),
        ("gradient_sums", _gradient_sums),
        ("norm_backward", _norm_backward),
        ("depthwise", _depthwise),
        ("depthwise_backward", _depthwise_backward),
    ):
        torch.library.register_fake(f"effkernels::training_{_name}", _fake)

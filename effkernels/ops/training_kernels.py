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


def _statistics(t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(6, t.shape[3], dtype=torch.float32)


def _product(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:3], weight.shape[0]), x.new_empty(6, weight.shape[0], dtype=torch.float32)


def _like_t(t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape)


def _squeeze(t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape[0], t.shape[3], dtype=torch.float64)


def _gradient_sums(g: Tensor, t: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return t.new_empty(6, t.shape[0], t.shape[3], dtype=torch.float64), t.new_empty(t.shape if settings[-1] else 0)


def _norm_backward(dy: Tensor, t: Tensor, *_: Any) -> Tensor:
    return t.new_empty(t.shape)


def _depthwise(t: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, _, stride, padding = arguments[5:9]
    return t.new_empty(t.shape[0], *_size_after(t, weight, stride, padding), t.shape[3]), _statistics(t)


def _depthwise_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    t, mean, weight = arguments[12], arguments[13], arguments[18]
    sums = t.new_empty(0 if mean is None else 2, t.shape[3], dtype=torch.float64)
    return t.new_empty(t.shape), weight.new_empty(weight.shape, dtype=torch.float32), sums


def _running(*_: Any) -> None:
    return None


def _norm_gradient(sums: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    channels, floats = sums.shape[-1], torch.float32
    weight, bias = (sums.new_empty(channels, dtype=floats if like is None else like.dtype) for like in arguments[-2:])
    return weight, bias, sums.new_empty(2, channels, dtype=floats)


def _excite(means: Tensor, *_: Any) -> Tensor:
    return means.new_empty(means.shape, dtype=torch.float32)


def _excite_backward(sums: Tensor, pixels: int, *arguments: Any) -> tuple[Tensor, ...]:
    w_reduce, b_reduce, w_expand, b_expand = arguments[:4]
    channels, reduced = sums.shape[2], w_reduce.shape[0]
    sizes = (
        ((reduced, channels), w_reduce),
        ((reduced,), b_reduce),
        ((channels, reduced), w_expand),
        ((channels,), b_expand),
    )
    return sums.new_empty(sums.shape[1:], dtype=torch.float32), *(
        sums.new_empty(size, dtype=torch.float32 if like is None else like.dtype) for size, like in sizes
    )


def _product_weights(weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    outputs, inputs = weight.shape[:2]
    scaled, middle = (weight.new_empty(inputs, channels, 1, 1) for channels in (outputs, inputs))
    return scaled, middle, weight.new_empty(inputs, dtype=torch.float32)


def _product_gradient(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(*weight.shape[:2], 1, 1)


def _size_after(t: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> list[Any]:
    sizes = zip(t.shape[1:3], weight.shape[2:], (sum(padding[:2]), sum(padding[2:])), strict=True)
    return [(size + pads - kernel) // stride + 1 for size, kernel, pads in sizes]


if _library.is_loaded():
    for _name, _fake in (
        ("statistics", _statistics),
        ("product", _product),
        ("running", _running),
        ("norm_gradient", _norm_gradient),
        ("excite", _excite),
        ("excite_backward", _excite_backward),
        ("product_weights", _product_weights),
        ("product_gradient", _product_gradient),
        ("norm_act", _like_t),
        ("squeeze", _squeeze),
        ("gradient_sums", _gradient_sums),
        ("norm_backward", _norm_backward),
        ("depthwise", _depthwise),
        ("depthwise_backward", _depthwise_backward),
    ):
        torch.library.register_fake(f"effkernels::training_{_name}", _fake)

"""Depthwise convolution with batch norm and activation, alone or with the means that squeeze-and-excitation needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops import _checks, reference
from effkernels.ops._registration import Operator, empty_image, register, run
from effkernels.ops._signature import parts
from effkernels.ops.backends import choose


def depthwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> Tensor:
    """Depthwise convolution, batch norm and activation in one pass: act(norm(dwconv(x) + bias)).

    Equivalent PyTorch, for symmetric padding:

        z = F.conv2d(x, weight, bias, stride, (top, left), dilation, groups=C)
        y = act(F.batch_norm(z, norm.mean, norm.var, norm.weight, norm.bias, training=False, eps=norm.eps))

    Sums, norm and activation are computed in float32 whatever the dtypes.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        weight: (C, 1, KH, KW), KH and KW from 1 to 13. This and every parameter below is float32 or of x's dtype.
        bias: (C,), the bias of the convolution, or None.
        norm: `effkernels.ops.Norm` over C channels, such as `Norm.of(batch_norm)`, or None for no norm.
        stride: of both axes, 1 or 2.
        padding: zeros added at (top, bottom, left, right), in pixels, none negative.
        dilation: of both axes, at least 1.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C, H', W') in x's dtype, with exact channels_last strides;
        H' = (H + top + bottom - dilation * (KH - 1) - 1) // stride + 1 and likewise W'.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose("depthwise_bn_act", x, weight, stride, activation, backend)
    norm_parts = parts(norm, "depthwise_bn_act")
    return run(_bn_act, chosen, (x, weight, bias, *norm_parts, stride, padding, dilation, activation))


def depthwise_bn_act_squeeze(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_bn_act` together with the mean of each channel of its result, taken in the same pass.

    Equivalent PyTorch: y = depthwise_bn_act(...); pooled = y.float().mean((2, 3)). A compiled kernel takes the mean
    before y is rounded to its dtype.

    Arguments and errors are those of `depthwise_bn_act`.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        pooled: (N, C), float32 (float64 where x is float64).
    """
    chosen = choose("depthwise_bn_act_squeeze", x, weight, stride, activation, backend)
    norm_parts = parts(norm, "depthwise_bn_act_squeeze")
    return run(_bn_act_squeeze, chosen, (x, weight, bias, *norm_parts, stride, padding, dilation, activation))


def depthwise_flops(y_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Two per multiply-add, as torch.utils.flop_counter counts a convolution."""
    return 2 * prod(y_shape) * prod(weight_shape[2:])


def allocate_with_means(shape: Sequence[int], x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Return an uninitialised image of shape (N, C, H, W), and its pooled channels (N, C)."""
    return empty_image(shape, x), x.new_empty(tuple(shape[:2]), dtype=torch.float32)


def _flops(shapes: Mapping[str, Any], results: Any) -> int:
    return depthwise_flops(results, shapes["weight"])


def _flops_squeeze(shapes: Mapping[str, Any], results: Any) -> int:
    return depthwise_flops(results[0], shapes["weight"])


_bn_act = register(
    Operator("depthwise_bn_act", reference.depthwise_bn_act, _checks.depthwise, empty_image, _flops, cast=("x",))
)
_bn_act_squeeze = register(
    Operator(
        "depthwise_bn_act_squeeze",
        reference.depthwise_bn_act_squeeze,
        _checks.depthwise,
        allocate_with_means,
        _flops_squeeze,
        cast=("x",),
    )
)

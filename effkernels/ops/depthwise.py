"""Depthwise convolution with batch norm and activation, alone or with the means that squeeze-and-excitation needs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from effkernels.ops import _checks, reference
from effkernels.ops._registration import NORM_SCHEMA, Operator, call, call_reference, channels_last_empty, register
from effkernels.ops.backends import choose

ARGUMENTS = (
    "x",
    "weight",
    "bias",
    "norm_weight",
    "norm_bias",
    "norm_mean",
    "norm_var",
    "eps",
    "stride",
    "padding",
    "dilation",
    "activation",
)
SCHEMA = f"Tensor x, Tensor weight, {NORM_SCHEMA}, int stride, SymInt[4] padding, int dilation, str activation"
FOLLOW = ("weight", "bias", "norm_weight", "norm_bias", "norm_mean", "norm_var")


def depthwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    eps: float = 1e-5,
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
        y = act(F.batch_norm(z, norm_mean, norm_var, norm_weight, norm_bias, training=False, eps=eps))

    Sums, norm and activation are computed in float32 whatever the dtypes.

    Args:
        x: (N, C, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        weight: (C, 1, KH, KW), KH and KW from 1 to 13. This and every parameter below is float32 or of x's dtype.
        bias: (C,), the bias of the convolution, or None.
        norm_weight, norm_bias: (C,) or None, the affine parameters of the norm; None counts as 1 and 0.
        norm_mean, norm_var: (C,), running statistics. Both or neither; without them there is no norm.
        eps: added to the variance; finite and not negative.
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
    if chosen != "reference":
        return call(
            _bn_act,
            chosen,
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            norm_mean,
            norm_var,
            eps,
            stride,
            padding,
            dilation,
            activation,
        )
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    _checks.depthwise("depthwise_bn_act", x, weight, norm, eps, stride, padding, dilation, activation)
    return call_reference(BN_ACT, x, weight, *norm, eps, stride, padding, dilation, activation)


def depthwise_bn_act_squeeze(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    eps: float = 1e-5,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: int = 1,
    activation: str = "identity",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`depthwise_bn_act` together with the mean of each channel of its result, taken in the same pass.

    Equivalent PyTorch: y = depthwise_bn_act(...); pooled = y.float().mean((2, 3)). A compiled kernel takes the mean
    before y is rounded to its dtype.

    Arguments and errors are those of `depthwise_bn_act`.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        pooled: (N, C), float32 (float64 where x is float64).
    """
    chosen = choose("depthwise_bn_act_squeeze", x, weight, stride, activation, backend)
    if chosen != "reference":
        return call(
            _bn_act_squeeze,
            chosen,
            x,
            weight,
            bias,
            norm_weight,
            norm_bias,
            norm_mean,
            norm_var,
            eps,
            stride,
            padding,
            dilation,
            activation,
        )
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    _checks.depthwise("depthwise_bn_act_squeeze", x, weight, norm, eps, stride, padding, dilation, activation)
    return call_reference(BN_ACT_SQUEEZE, x, weight, *norm, eps, stride, padding, dilation, activation)


def fake_depthwise(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    activation: str,
) -> Tensor:
    """The empty result of the convolution inside `op`, after checking its arguments."""
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    height, width = _checks.depthwise(op, x, weight, norm, eps, stride, padding, dilation, activation)
    return channels_last_empty(x, (x.shape[0], x.shape[1], height, width))


def depthwise_flops(y_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Two per multiply-add, as torch.utils.flop_counter counts a convolution."""
    return 2 * prod(y_shape) * prod(weight_shape[2:])


def _fake_bn_act(*args: Any) -> Tensor:
    return fake_depthwise("depthwise_bn_act", *args)


def _fake_bn_act_squeeze(*args: Any) -> tuple[Tensor, Tensor]:
    y = fake_depthwise("depthwise_bn_act_squeeze", *args)
    return y, y.new_empty(y.shape[:2], dtype=torch.float32)


def _flops_bn_act(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return depthwise_flops(out_shape, weight)


def _flops_bn_act_squeeze(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return depthwise_flops(out_shape[0], weight)


BN_ACT = Operator(
    "depthwise_bn_act",
    f"({SCHEMA}) -> Tensor",
    reference.depthwise_bn_act,
    ARGUMENTS,
    _fake_bn_act,
    _flops_bn_act,
    cast=("x",),
    follow=FOLLOW,
)
BN_ACT_SQUEEZE = Operator(
    "depthwise_bn_act_squeeze",
    f"({SCHEMA}) -> (Tensor, Tensor)",
    reference.depthwise_bn_act_squeeze,
    ARGUMENTS,
    _fake_bn_act_squeeze,
    _flops_bn_act_squeeze,
    cast=("x",),
    follow=FOLLOW,
)
_bn_act = register(BN_ACT)
_bn_act_squeeze = register(BN_ACT_SQUEEZE)

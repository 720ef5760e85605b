"""Expand, depthwise and squeeze in one pass: the wide tensor between the two convolutions is never a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from effkernels.ops import _checks, _tf32, reference
from effkernels.ops._registration import NORM_SCHEMA, Operator, call, call_reference, channels_last_empty, register
from effkernels.ops.backends import choose
from effkernels.ops.depthwise import depthwise_flops

NAME = "expand_depthwise_squeeze"
EXPAND_SCHEMA = (
    "Tensor expand_weight, Tensor? expand_bias, Tensor? expand_norm_weight, Tensor? expand_norm_bias, "
    "Tensor? expand_norm_mean, Tensor? expand_norm_var, float expand_eps, str expand_activation"
)


def expand_depthwise_squeeze(
    x: Tensor,
    expand_weight: Tensor,
    weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    expand_norm_weight: Tensor | None = None,
    expand_norm_bias: Tensor | None = None,
    expand_norm_mean: Tensor | None = None,
    expand_norm_var: Tensor | None = None,
    expand_eps: float = 1e-5,
    expand_activation: str = "identity",
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    eps: float = 1e-5,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: int = 1,
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The first half of an MBConv block: 1x1 convolution, batch norm and activation, then depthwise convolution, batch
    norm and activation, and the mean of each channel of that.

    Equivalent PyTorch:

        e = pointwise_bn_act(x, expand_weight, expand_bias, ..., activation=expand_activation)
        y, pooled = depthwise_bn_act_squeeze(e, weight, bias, ..., stride=..., padding=..., activation=activation)

    where the zeros of the padding are zeros of `e`, behind the activation. The Triton and the CPU kernels compute `e`
    tile by tile and keep it on the chip (Triton in x's dtype, the CPU in float32); the compiled CUDA kernels are two
    launches.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        expand_weight: (C, C_in, 1, 1). This and every parameter below is float32 or of x's dtype.
        weight: (C, 1, KH, KW), KH and KW from 1 to 13.
        expand_bias, expand_norm_*, expand_eps, expand_activation: of the 1x1 convolution, as in `pointwise_bn_act`;
            vectors of length C.
        bias, norm_*, eps, stride, padding, dilation, activation: of the depthwise convolution, as in
            `depthwise_bn_act`.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        pooled: (N, C), float32 (float64 where x is float64).

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    arguments = (
        x,
        expand_weight,
        expand_bias,
        expand_norm_weight,
        expand_norm_bias,
        expand_norm_mean,
        expand_norm_var,
        expand_eps,
        expand_activation,
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
    chosen = choose(NAME, x, weight, stride, activation, backend)
    if chosen != "reference":
        return call(_overloads, chosen, *arguments, _tf32.resolve(allow_tf32, x))
    _check(*arguments)
    return call_reference(OPERATOR, *arguments, allow_tf32)


def _check(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    expand_norm_weight: Tensor | None,
    expand_norm_bias: Tensor | None,
    expand_norm_mean: Tensor | None,
    expand_norm_var: Tensor | None,
    expand_eps: float,
    expand_activation: str,
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
) -> tuple[int, int]:
    """Check the arguments; returns (out_height, out_width)."""
    expand_norm = (expand_bias, expand_norm_weight, expand_norm_bias, expand_norm_mean, expand_norm_var)
    _checks.pointwise(NAME, x, expand_weight, expand_norm, expand_eps, None, None, expand_activation, prefix="expand_")
    batch, _, height, width = x.shape
    expanded = x.new_empty(()).expand(batch, expand_weight.shape[0], height, width)  # of one element
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    return _checks.depthwise(
        NAME, expanded, weight, norm, eps, stride, padding, dilation, activation, channels_of="expand_weight"
    )


def _fake(x: Tensor, expand_weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    height, width = _check(x, expand_weight, *others[:-1])
    y = channels_last_empty(x, (x.shape[0], expand_weight.shape[0], height, width))
    return y, y.new_empty(y.shape[:2], dtype=torch.float32)


def _flops(x: Sequence[int], expand_weight: Sequence[int], *args: Any, out_shape: Any, **kwargs: Any) -> int:
    weight = args[7]
    expand = 2 * x[0] * x[2] * x[3] * prod(expand_weight[:2])
    return expand + depthwise_flops(out_shape[0], weight)


OPERATOR = Operator(
    NAME,
    f"(Tensor x, {EXPAND_SCHEMA}, Tensor weight, {NORM_SCHEMA}, int stride, SymInt[4] padding, int dilation, "
    "str activation, bool allow_tf32) -> (Tensor, Tensor)",
    reference.expand_depthwise_squeeze,
    (
        "x",
        "expand_weight",
        "expand_bias",
        "expand_norm_weight",
        "expand_norm_bias",
        "expand_norm_mean",
        "expand_norm_var",
        "expand_eps",
        "expand_activation",
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
        "allow_tf32",
    ),
    _fake,
    _flops,
    cast=("x", "expand_weight"),
    follow=(
        "expand_bias",
        "expand_norm_weight",
        "expand_norm_bias",
        "expand_norm_mean",
        "expand_norm_var",
        "weight",
        "bias",
        "norm_weight",
        "norm_bias",
        "norm_mean",
        "norm_var",
    ),
)
_overloads = register(OPERATOR)

"""Dense convolution with batch norm and activation: the stem of a network, and fused expansions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels.ops import _checks, _tf32, reference
from effkernels.ops._registration import NORM_SCHEMA, Operator, call, call_reference, channels_last_empty, register
from effkernels.ops.backends import choose

NAME = "conv_bn_act"


def conv_bn_act(
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
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense convolution (groups 1, dilation 1), batch norm and activation: act(norm(conv(x) + bias)).

    Equivalent PyTorch, for symmetric padding:

        z = F.conv2d(x, weight, bias, stride, (top, left))
        y = act(F.batch_norm(z, norm_mean, norm_var, norm_weight, norm_bias, training=False, eps=eps))

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides.
        weight: (C_out, C_in, K_h, K_w). This and every parameter below is float32 or of x's dtype.
        bias: (C_out,), the bias of the convolution, or None.
        norm_weight, norm_bias: (C_out,) or None, the affine parameters of the norm; None counts as 1 and 0.
        norm_mean, norm_var: (C_out,), running statistics. Both or neither; without them there is no norm.
        eps: added to the variance; finite and not negative.
        stride: of both axes, 1 or 2.
        padding: zeros added at (top, bottom, left, right), in pixels, none negative.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H', W') in x's dtype, with exact channels_last strides;
        H' = (H + top + bottom - K_h) // stride + 1 and likewise W'.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, stride, activation, backend)
    if chosen != "reference":
        return call(
            _overloads,
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
            activation,
            _tf32.resolve(allow_tf32, x),
        )
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    _checks.conv(NAME, x, weight, norm, eps, stride, padding, activation)
    return call_reference(OPERATOR, x, weight, *norm, eps, stride, padding, activation, allow_tf32)


def _fake(
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
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    height, width = _checks.conv(NAME, x, weight, norm, eps, stride, padding, activation)
    return channels_last_empty(x, (x.shape[0], weight.shape[0], height, width))


def _flops(x: Any, weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


OPERATOR = Operator(
    NAME,
    f"(Tensor x, Tensor weight, {NORM_SCHEMA}, int stride, SymInt[4] padding, str activation, bool allow_tf32)"
    " -> Tensor",
    reference.conv_bn_act,
    (
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
        "activation",
        "allow_tf32",
    ),
    _fake,
    _flops,
    cast=("x", "weight"),
    follow=("bias", "norm_weight", "norm_bias", "norm_mean", "norm_var"),
)
_overloads = register(OPERATOR)

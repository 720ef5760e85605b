"""1x1 convolution with gate, batch norm, activation and residual: the expand and project products of a block."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels.ops import _checks, _tf32, reference
from effkernels.ops._registration import NORM_SCHEMA, Operator, call, call_reference, channels_last_empty, register
from effkernels.ops.backends import choose

NAME = "pointwise_bn_act"


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    eps: float = 1e-5,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution of a gated input, batch norm, activation and residual in one pass.

    Equivalent PyTorch:

        z = F.conv2d(x * gate[:, :, None, None], weight, bias)
        y = act(F.batch_norm(z, norm_mean, norm_var, norm_weight, norm_bias, training=False, eps=eps)) + residual

    Sums, norm, activation and the residual addition are computed in float32 whatever the dtypes.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        weight: (C_out, C_in, 1, 1). This and every parameter below is float32 or of x's dtype.
        bias: (C_out,), the bias of the convolution, or None.
        norm_weight, norm_bias: (C_out,) or None, the affine parameters of the norm; None counts as 1 and 0.
        norm_mean, norm_var: (C_out,), running statistics. Both or neither; without them there is no norm.
        eps: added to the variance; finite and not negative.
        gate: (N, C_in), float32 or of x's dtype, or None; multiplies the input as it is read.
        residual: (N, C_out, H, W) of x's dtype, or None; added last, after the activation.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H, W) in x's dtype, with exact channels_last strides.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, 1, activation, backend)
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
            gate,
            residual,
            activation,
            _tf32.resolve(allow_tf32, x),
        )
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    _checks.pointwise(NAME, x, weight, norm, eps, gate, residual, activation)
    return call_reference(OPERATOR, x, weight, *norm, eps, gate, residual, activation, allow_tf32)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
) -> Tensor:
    norm = (bias, norm_weight, norm_bias, norm_mean, norm_var)
    _checks.pointwise(NAME, x, weight, norm, eps, gate, residual, activation)
    return channels_last_empty(x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))


def _flops(x: Any, weight: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any) -> int:
    return 2 * prod(out_shape) * weight[1]


OPERATOR = Operator(
    NAME,
    f"(Tensor x, Tensor weight, {NORM_SCHEMA}, Tensor? gate, Tensor? residual, str activation, bool allow_tf32)"
    " -> Tensor",
    reference.pointwise_bn_act,
    (
        "x",
        "weight",
        "bias",
        "norm_weight",
        "norm_bias",
        "norm_mean",
        "norm_var",
        "eps",
        "gate",
        "residual",
        "activation",
        "allow_tf32",
    ),
    _fake,
    _flops,
    cast=("x", "weight", "residual"),
    follow=("bias", "norm_weight", "norm_bias", "norm_mean", "norm_var", "gate"),
)
_overloads = register(OPERATOR)

"""Squeeze-and-excitation: the gate alone, and behind a depthwise convolution, left to the consumer or applied."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels.ops import _checks, depthwise, reference
from effkernels.ops._registration import Operator, call, call_reference, channels_last_empty, register
from effkernels.ops.backends import choose

SE_SCHEMA = "Tensor w_reduce, Tensor? b_reduce, Tensor w_expand, Tensor? b_expand, str se_activation, str gate"
SE_ARGUMENTS = ("w_reduce", "b_reduce", "w_expand", "b_expand", "se_activation", "gate")


def squeeze_excite_gate(
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    *,
    activation: str = "silu",
    gate: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """The gate of squeeze-and-excitation from pooled channels, both products in one launch.

    Equivalent PyTorch (Hu et al. 2018, equation 3):

        gate(F.linear(act(F.linear(pooled, w_reduce, b_reduce)), w_expand, b_expand))

    Sums and activations are computed in float32.

    Args:
        pooled: (N, C), float32 (float64 runs the reference).
        w_reduce: (R, C) or (R, C, 1, 1). Every parameter is float32, or of the dtype of w_expand.
        b_reduce: (R,) or None.
        w_expand: (C, R) or (C, R, 1, 1), float32, float16 or bfloat16.
        b_expand: (C,) or None.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh; between the two products.
        gate: sigmoid or hard_sigmoid; after the second.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C) in the dtype of w_expand.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose("squeeze_excite_gate", pooled, None, 1, activation, backend)
    if chosen != "reference":
        return call(_gate, chosen, pooled, w_reduce, b_reduce, w_expand, b_expand, activation, gate)
    _check_gate(pooled, w_reduce, b_reduce, w_expand, b_expand, activation, gate)
    return call_reference(GATE, pooled, w_reduce, b_reduce, w_expand, b_expand, activation, gate)


def depthwise_bn_act_gate(
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
    w_reduce: Tensor,
    b_reduce: Tensor | None = None,
    w_expand: Tensor,
    b_expand: Tensor | None = None,
    se_activation: str = "silu",
    gate: str = "sigmoid",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`depthwise_bn_act` and the squeeze-and-excitation gate of its result, which the consumer multiplies in.

    Equivalent PyTorch: y, pooled = depthwise_bn_act_squeeze(...); gate = squeeze_excite_gate(pooled, ...).to(x.dtype).
    `pointwise_bn_act(y, ..., gate=gate)` applies the gate as it reads y, so that the gated tensor is never written.

    Arguments and errors are those of `depthwise_bn_act` and of `squeeze_excite_gate`, whose `activation` is here called
    `se_activation`; the matrices are float32 or of x's dtype.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        gate: (N, C) in x's dtype.
    """
    chosen = choose("depthwise_bn_act_gate", x, weight, stride, activation, backend)
    if chosen != "reference":
        return call(
            _bn_act_gate,
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
            w_reduce,
            b_reduce,
            w_expand,
            b_expand,
            se_activation,
            gate,
        )
    conv = (x, weight, bias, norm_weight, norm_bias, norm_mean, norm_var, eps, stride, padding, dilation, activation)
    excite = (w_reduce, b_reduce, w_expand, b_expand, se_activation, gate)
    _check_with_depthwise("depthwise_bn_act_gate", conv, excite)
    return call_reference(BN_ACT_GATE, *conv, *excite)


def depthwise_bn_act_se(
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
    w_reduce: Tensor,
    b_reduce: Tensor | None = None,
    w_expand: Tensor,
    b_expand: Tensor | None = None,
    se_activation: str = "silu",
    gate: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """`depthwise_bn_act` with squeeze-and-excitation applied to its result.

    Equivalent PyTorch: y, gate = depthwise_bn_act_gate(...); y * gate[:, :, None, None].

    Arguments and errors are those of `depthwise_bn_act_gate`.

    Returns:
        (N, C, H', W') in x's dtype, with exact channels_last strides.
    """
    chosen = choose("depthwise_bn_act_se", x, weight, stride, activation, backend)
    if chosen != "reference":
        return call(
            _bn_act_se,
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
            w_reduce,
            b_reduce,
            w_expand,
            b_expand,
            se_activation,
            gate,
        )
    conv = (x, weight, bias, norm_weight, norm_bias, norm_mean, norm_var, eps, stride, padding, dilation, activation)
    excite = (w_reduce, b_reduce, w_expand, b_expand, se_activation, gate)
    _check_with_depthwise("depthwise_bn_act_se", conv, excite)
    return call_reference(BN_ACT_SE, *conv, *excite)


def _check_gate(
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    activation: str,
    gate: str,
) -> None:
    _checks.pooled("squeeze_excite_gate", pooled)
    _checks.squeeze_excite(
        "squeeze_excite_gate",
        pooled.shape[1],
        pooled.device,
        w_expand.dtype,
        w_reduce,
        b_reduce,
        w_expand,
        b_expand,
        activation,
        gate,
        activation_name="activation",
    )


def _check_with_depthwise(op: str, conv: Sequence[Any], excite: Sequence[Any]) -> tuple[int, ...]:
    """Check the arguments of `op`; returns the shape of its y."""
    x, weight, *norm, eps, stride, padding, dilation, activation = conv
    height, width = _checks.depthwise(op, x, weight, tuple(norm), eps, stride, padding, dilation, activation)
    _checks.squeeze_excite(op, x.shape[1], x.device, x.dtype, *excite)
    return x.shape[0], x.shape[1], height, width


def _fake_gate(*args: Any) -> Tensor:
    _check_gate(*args)
    pooled: Tensor = args[0]
    w_expand: Tensor = args[3]
    return pooled.new_empty(pooled.shape, dtype=w_expand.dtype)


def _fake_bn_act_gate(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = _check_with_depthwise("depthwise_bn_act_gate", (x, *args[:-6]), args[-6:])
    return channels_last_empty(x, shape), x.new_empty(shape[:2])


def _fake_bn_act_se(x: Tensor, *args: Any) -> Tensor:
    return channels_last_empty(x, _check_with_depthwise("depthwise_bn_act_se", (x, *args[:-6]), args[-6:]))


def _excite_flops(batch: int, w_reduce: Sequence[int], w_expand: Sequence[int]) -> int:
    return 2 * batch * (prod(w_reduce) + prod(w_expand))


def _flops_gate(
    pooled: Any, w_reduce: Any, b_reduce: Any, w_expand: Any, *args: Any, out_shape: Any, **kwargs: Any
) -> int:
    return _excite_flops(pooled[0], w_reduce, w_expand)


def _flops_bn_act_gate(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return depthwise.depthwise_flops(out_shape[0], weight) + _excite_flops(x[0], args[-6], args[-4])


def _flops_bn_act_se(x: Any, weight: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return depthwise.depthwise_flops(out_shape, weight) + _excite_flops(x[0], args[-6], args[-4])


GATE = Operator(
    "squeeze_excite_gate",
    f"(Tensor pooled, {SE_SCHEMA}) -> Tensor",
    reference.squeeze_excite_gate,
    ("pooled", "w_reduce", "b_reduce", "w_expand", "b_expand", "activation", "gate"),
    _fake_gate,
    _flops_gate,
    cast=("w_reduce", "w_expand"),
    follow=("b_reduce", "b_expand"),
)
BN_ACT_GATE = Operator(
    "depthwise_bn_act_gate",
    f"({depthwise.SCHEMA}, {SE_SCHEMA}) -> (Tensor, Tensor)",
    reference.depthwise_bn_act_gate,
    depthwise.ARGUMENTS + SE_ARGUMENTS,
    _fake_bn_act_gate,
    _flops_bn_act_gate,
    cast=("x", "w_reduce", "w_expand"),
    follow=(*depthwise.FOLLOW, "b_reduce", "b_expand"),
)
BN_ACT_SE = Operator(
    "depthwise_bn_act_se",
    f"({depthwise.SCHEMA}, {SE_SCHEMA}) -> Tensor",
    reference.depthwise_bn_act_se,
    depthwise.ARGUMENTS + SE_ARGUMENTS,
    _fake_bn_act_se,
    _flops_bn_act_se,
    cast=("x", "w_reduce", "w_expand"),
    follow=(*depthwise.FOLLOW, "b_reduce", "b_expand"),
)
_gate = register(GATE)
_bn_act_gate = register(BN_ACT_GATE)
_bn_act_se = register(BN_ACT_SE)

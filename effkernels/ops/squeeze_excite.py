"""Squeeze-and-excitation: the gate alone, and after a depthwise convolution, returned or applied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops import _checks, depthwise, reference
from effkernels.ops._registration import Operator, empty_image, register, run
from effkernels.ops._signature import parts
from effkernels.ops.backends import choose


def squeeze_excite_gate(
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    *,
    activation: str = "silu",
    gate_activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """Compute the gate of squeeze-and-excitation from pooled channels, both products in one launch.

    Equivalent PyTorch (Hu et al. 2018, equation 3):

        gate_act(F.linear(act(F.linear(pooled, w_reduce, b_reduce)), w_expand, b_expand))

    Sums and activations are computed in float32.

    Args:
        pooled: (N, C), float32 (float64 runs the reference).
        w_reduce: (R, C) or (R, C, 1, 1). Every parameter is float32, or of the dtype of w_expand.
        b_reduce: (R,) or None.
        w_expand: (C, R) or (C, R, 1, 1), float32, float16 or bfloat16.
        b_expand: (C,) or None.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh; between the two products.
        gate_activation: sigmoid or hard_sigmoid; after the second.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C) in the dtype of w_expand.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose("squeeze_excite_gate", pooled, None, 1, activation, backend)
    return run(_gate, chosen, (pooled, w_reduce, b_reduce, w_expand, b_expand, activation, gate_activation))


def depthwise_bn_act_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
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
    gate_activation: str = "sigmoid",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_bn_act` and the squeeze-and-excitation gate of its result, which the consumer multiplies in.

    Equivalent PyTorch: y, pooled = depthwise_bn_act_squeeze(...); gate = squeeze_excite_gate(pooled, ...).to(x.dtype).
    `pointwise_bn_act(y, ..., gate=gate)` applies the gate as it reads y, so that the gated tensor is never written.

    Arguments and errors are those of `depthwise_bn_act` and of `squeeze_excite_gate`, whose `activation` is here called
    `se_activation`; the matrices are float32 or of x's dtype.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        gate: (N, C) in x's dtype.
    """
    chosen = choose("depthwise_bn_act_gate", x, weight, stride, activation, backend)
    conv = (x, weight, bias, *parts(norm, "depthwise_bn_act_gate"), stride, padding, dilation, activation)
    excite = (w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation)
    return run(_bn_act_gate, chosen, (*conv, *excite))


def depthwise_bn_act_se(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
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
    gate_activation: str = "sigmoid",
    backend: str = "auto",
) -> Tensor:
    """Compute `depthwise_bn_act` with squeeze-and-excitation applied to its result.

    Equivalent PyTorch: y, gate = depthwise_bn_act_gate(...); y * gate[:, :, None, None].

    Arguments and errors are those of `depthwise_bn_act_gate`.

    Returns:
        (N, C, H', W') in x's dtype, with exact channels_last strides.
    """
    chosen = choose("depthwise_bn_act_se", x, weight, stride, activation, backend)
    conv = (x, weight, bias, *parts(norm, "depthwise_bn_act_se"), stride, padding, dilation, activation)
    excite = (w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation)
    return run(_bn_act_se, chosen, (*conv, *excite))


def _check_gate(op: str, pooled: Tensor, *excite: Any) -> tuple[int, ...]:
    """Check the arguments of `squeeze_excite_gate`; returns the shape of the gate."""
    _checks.pooled(op, pooled)
    _, _, w_expand, *_ = excite
    device, dtype = pooled.device, w_expand.dtype
    _checks.squeeze_excite(op, pooled.shape[1], device, dtype, *excite, activation_name="activation")
    return tuple(pooled.shape)


def _check(op: str, x: Tensor, *args: Any) -> tuple[int, ...]:
    """Check the arguments of a depthwise operator with squeeze-and-excitation; returns the shape of y."""
    shape = _checks.depthwise(op, x, *args[:-6])
    _checks.squeeze_excite(op, x.shape[1], x.device, x.dtype, *args[-6:])
    return shape


def _allocate_gate(shape: Sequence[int], pooled: Tensor, *excite: Any) -> Tensor:
    _, _, w_expand, *_ = excite
    return pooled.new_empty(tuple(shape), dtype=w_expand.dtype)


def _allocate_with_gate(shape: Sequence[int], x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_image(shape, x), x.new_empty(tuple(shape[:2]))


def _flops_gate(shapes: Mapping[str, Any], results: Any) -> int:
    batch: int = (shapes["pooled"] if "pooled" in shapes else shapes["x"])[0]
    products: int = prod(shapes["w_reduce"]) + prod(shapes["w_expand"])
    return 2 * batch * products


def _flops_bn_act_gate(shapes: Mapping[str, Any], results: Any) -> int:
    return depthwise.depthwise_flops(results[0], shapes["weight"]) + _flops_gate(shapes, results)


def _flops_bn_act_se(shapes: Mapping[str, Any], results: Any) -> int:
    return depthwise.depthwise_flops(results, shapes["weight"]) + _flops_gate(shapes, results)


_MATRICES = ("w_reduce", "w_expand")
_gate = register(
    Operator(
        "squeeze_excite_gate",
        reference.squeeze_excite_gate,
        _check_gate,
        _allocate_gate,
        _flops_gate,
        cast=_MATRICES,
    )
)
_bn_act_gate = register(
    Operator(
        "depthwise_bn_act_gate",
        reference.depthwise_bn_act_gate,
        _check,
        _allocate_with_gate,
        _flops_bn_act_gate,
        cast=("x", *_MATRICES),
    )
)
_bn_act_se = register(
    Operator(
        "depthwise_bn_act_se",
        reference.depthwise_bn_act_se,
        _check,
        empty_image,
        _flops_bn_act_se,
        cast=("x", *_MATRICES),
    )
)

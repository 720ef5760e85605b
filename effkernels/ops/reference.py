"""Every operator of `effkernels.ops` in plain PyTorch.

These functions are the yardstick of the tests (given float64 tensors they are the truth), the fallback where no kernel
runs, the way of an ONNX export, and the source of the gradients: the backward of a fused operator recomputes its
function here and differentiates that. They compute as ordinary modules would (`F.conv2d`, `F.batch_norm`, ... in the
dtype of `x`), on any device, in any floating dtype, forward and backward, and also on `torch.device("meta")`.

Shapes are PyTorch's logical ones, (N, C, H, W). Every four-dimensional result has exact channels_last strides, as
`torch.empty(shape, memory_format=torch.channels_last)` gives, whatever the strides of the inputs.

The norm comes as a batch norm stores it (`effkernels.ops.Norm`):

    norm(z) = (z - mean) / sqrt(var + eps) * weight + bias      (per channel)

where a missing `weight` counts as 1 and a missing `bias` as 0; without a norm `norm(z) = z`. Parameters may be float32
or of x's dtype, each on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels._norm import Norm

ACTIVATIONS: tuple[str, ...] = ("identity", "relu", "relu6", "silu", "hard_swish", "gelu", "gelu_tanh")
GATES: tuple[str, ...] = ("sigmoid", "hard_sigmoid")
ALIASES: dict[str, str] = {"swish": "silu", "hardswish": "hard_swish", "hardsigmoid": "hard_sigmoid"}
"""Other names under which activations and gates are accepted. csrc/ops/check.cpp knows the same."""

_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hard_swish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
}
_GATE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


def canonical_name(name: Any) -> Any:
    """Return the name in `ACTIVATIONS` or `GATES` for one of `ALIASES`; return anything else unchanged."""
    return ALIASES.get(name, name) if type(name) is str else name


def activate(t: Tensor, activation: str) -> Tensor:
    """Apply one of `ACTIVATIONS` elementwise; ValueError for any other name."""
    function = _ACTIVATION_FUNCTIONS.get(canonical_name(activation))
    if function is None:
        raise ValueError(f"activation={activation!r} is not known; allowed: {', '.join(ACTIVATIONS)}")
    return function(t)


def apply_gate(t: Tensor, gate_activation: str) -> Tensor:
    """Apply one of `GATES` elementwise; ValueError for any other name."""
    function = _GATE_FUNCTIONS.get(canonical_name(gate_activation))
    if function is None:
        raise ValueError(f"gate_activation={gate_activation!r} is not known; allowed: {', '.join(GATES)}")
    return function(t)


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
) -> Tensor:
    """Depthwise convolution, batch norm and activation: act(norm(dwconv(x) + bias)).

    Args:
        x: (N, C, H, W), floating.
        weight: (C, 1, KH, KW).
        bias: (C,), the bias of the convolution, or None.
        norm: over C channels, or None.
        stride: of both axes, in pixels.
        padding: zeros added at (top, bottom, left, right), in pixels.
        dilation: of both axes.
        activation: one of `ACTIVATIONS`.

    Returns:
        (N, C, H', W') in x's dtype, H' = (H + top + bottom - dilation * (KH - 1) - 1) // stride + 1 and likewise W'.

    Raises:
        ValueError: activation unknown.
    """
    z = _convolve(x, weight, bias, stride, padding, dilation, groups=weight.shape[0])
    z = _normalize(z, norm)
    return _channels_last(activate(z, activation))


def depthwise_bn_act_squeeze(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_bn_act` together with the mean of each channel over the image.

    Arguments and errors are those of `depthwise_bn_act`.

    Returns:
        y: (N, C, H', W') in x's dtype.
        pooled: (N, C), y.mean((2, 3)) in float32 (float64 where x is float64).
    """
    y = depthwise_bn_act(*args, **options)
    return y, _pool(y)


def squeeze_excite_gate(
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    *,
    activation: str = "silu",
    gate_activation: str = "sigmoid",
) -> Tensor:
    """Compute the gate of squeeze-and-excitation from pooled channels (Hu et al. 2018, equation 3).

        gate(w_expand @ act(w_reduce @ pooled + b_reduce) + b_expand)

    Args:
        pooled: (N, C), the mean of each channel.
        w_reduce: (R, C) or (R, C, 1, 1).
        b_reduce: (R,) or None.
        w_expand: (C, R) or (C, R, 1, 1).
        b_expand: (C,) or None.
        activation: one of `ACTIVATIONS`, between the two products.
        gate_activation: one of `GATES`, after the second.

    Returns:
        (N, C) in the dtype of w_expand, which is also the dtype of the computation.

    Raises:
        ValueError: activation or gate_activation unknown.
    """
    return _excite(pooled, w_reduce, b_reduce, w_expand, b_expand, activation, gate_activation, w_expand.dtype)


def depthwise_bn_act_gate(
    x: Tensor,
    *args: Any,
    w_reduce: Tensor,
    b_reduce: Tensor | None = None,
    w_expand: Tensor,
    b_expand: Tensor | None = None,
    se_activation: str = "silu",
    gate_activation: str = "sigmoid",
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute `depthwise_bn_act` together with the squeeze-and-excitation gate of its result, not yet applied.

    Arguments and errors are those of `depthwise_bn_act` and `squeeze_excite_gate`, whose `activation` is here called
    `se_activation`.

    Returns:
        y: (N, C, H', W') in x's dtype.
        gate: (N, C) in x's dtype; y * gate[:, :, None, None] is the gated result.
    """
    y, pooled = depthwise_bn_act_squeeze(x, *args, **options)
    return y, _excite(pooled, w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation, x.dtype)


def depthwise_bn_act_se(*args: Any, **options: Any) -> Tensor:
    """Compute `depthwise_bn_act` with squeeze-and-excitation applied: y * gate[:, :, None, None].

    Arguments and errors are those of `depthwise_bn_act_gate`.

    Returns:
        (N, C, H', W') in x's dtype.
    """
    y, gate = depthwise_bn_act_gate(*args, **options)
    return _channels_last(y * gate[:, :, None, None])


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    allow_tf32: bool | None = None,
) -> Tensor:
    """1x1 convolution of a gated input, batch norm, activation and residual.

        act(norm(conv1x1(x * gate[:, :, None, None]) + bias)) + residual

    Args:
        x: (N, C_in, H, W), floating.
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,) or None.
        norm: over C_out channels, or None.
        gate: (N, C_in) or None; multiplies the input.
        residual: (N, C_out, H, W) or None; added last, after the activation.
        activation: one of `ACTIVATIONS`.
        allow_tf32: accepted for the sake of one signature; here PyTorch's own setting holds.

    Returns:
        (N, C_out, H, W) in x's dtype.

    Raises:
        ValueError: activation unknown.
    """
    if gate is not None:
        x = x * gate.to(x.dtype)[:, :, None, None]
    z = _convolve(x, weight, bias, 1, (0, 0, 0, 0), 1, groups=1)
    z = activate(_normalize(z, norm), activation)
    return _channels_last(z if residual is None else z + residual)


def pointwise_bn_act_pool(*args: Any, **options: Any) -> Tensor:
    """Compute `pointwise_bn_act` and the mean of each channel over the image: global average pooling.

    Arguments and errors are those of `pointwise_bn_act`, without gate and residual.

    Returns:
        (N, C_out) in x's dtype.
    """
    return pointwise_bn_act(*args, **options).mean((2, 3))


def expand_depthwise_squeeze(
    x: Tensor,
    expand_weight: Tensor,
    weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    expand_norm: Norm | None = None,
    expand_activation: str = "identity",
    allow_tf32: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the first half of an MBConv block: `pointwise_bn_act` with the `expand_` arguments, then
    `depthwise_bn_act_squeeze` of its result with the others.

    Arguments and errors are those of the two.

    Returns:
        y: (N, C, H', W') in x's dtype, C the rows of expand_weight.
        pooled: (N, C), y.mean((2, 3)) in float32 (float64 where x is float64).
    """
    expanded = pointwise_bn_act(x, expand_weight, expand_bias, expand_norm, activation=expand_activation)
    return depthwise_bn_act_squeeze(expanded, weight, **options)


def mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    project_weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    expand_norm: Norm | None = None,
    expand_activation: str = "identity",
    w_reduce: Tensor | None = None,
    b_reduce: Tensor | None = None,
    w_expand: Tensor | None = None,
    b_expand: Tensor | None = None,
    se_activation: str = "silu",
    gate_activation: str = "sigmoid",
    project_bias: Tensor | None = None,
    project_norm: Norm | None = None,
    residual: Tensor | None = None,
    allow_tf32: bool | None = None,
    **options: Any,
) -> Tensor:
    """Compute an MBConv block: `pointwise_bn_act` with the `expand_` arguments, `depthwise_bn_act_gate` of its result,
    then `pointwise_bn_act` with the gate, the `project_` arguments and the residual.

    Arguments and errors are those of the three. Without expand_weight the first is left out. Without w_reduce and
    w_expand there is no gate, and `depthwise_bn_act` in its place.

    Returns:
        (N, C_out, H', W') in x's dtype, C_out the rows of project_weight.
    """
    y = x
    if expand_weight is not None:
        y = pointwise_bn_act(x, expand_weight, expand_bias, expand_norm, activation=expand_activation)
    gate = None
    if w_reduce is None or w_expand is None:
        y = depthwise_bn_act(y, weight, **options)
    else:
        y, gate = depthwise_bn_act_gate(
            y,
            weight,
            **options,
            w_reduce=w_reduce,
            b_reduce=b_reduce,
            w_expand=w_expand,
            b_expand=b_expand,
            se_activation=se_activation,
            gate_activation=gate_activation,
        )
    return pointwise_bn_act(y, project_weight, project_bias, project_norm, gate=gate, residual=residual)


def mbconv_stack(x: Tensor, blocks: Sequence[Mapping[str, Any]], *, allow_tf32: bool | None = None) -> Tensor:
    """Compute MBConv blocks that follow each other: `mbconv` of each, whose residual, if it has one, is its input.

    Args:
        x: (N, C_in, H, W), floating.
        blocks: the arguments of `mbconv` of each by name, without x and allow_tf32; `residual` is whether the block
            adds its input to its result.
        allow_tf32: as of `mbconv`.

    Returns:
        (N, C_out, H', W') of the last block in x's dtype.
    """
    for block in blocks:
        residual = x if block.get("residual") else None
        x = mbconv(x, **{"expand_weight": None, **block, "residual": residual}, allow_tf32=allow_tf32)
    return x


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    activation: str = "identity",
    allow_tf32: bool | None = None,
) -> Tensor:
    """Dense convolution, batch norm and activation: act(norm(conv(x) + bias)).

    Args:
        x: (N, C_in, H, W), floating.
        weight: (C_out, C_in, K_h, K_w).
        bias: (C_out,) or None.
        norm: over C_out channels, or None.
        stride: of both axes, in pixels.
        padding: zeros added at (top, bottom, left, right), in pixels.
        activation: one of `ACTIVATIONS`.
        allow_tf32: accepted for the sake of one signature; here PyTorch's own setting holds.

    Returns:
        (N, C_out, H', W') in x's dtype.

    Raises:
        ValueError: activation unknown.
    """
    z = _convolve(x, weight, bias, stride, padding, 1, groups=1)
    return _channels_last(activate(_normalize(z, norm), activation))


def _surely(condition: bool | torch.SymBool | Tensor) -> bool:
    """True where `condition` holds for certain. Unlike `bool(condition)` it never puts a guard on a symbolic size."""
    if isinstance(condition, bool) and not torch.compiler.is_compiling():  # a trace calls its symbols bool too
        return condition
    if isinstance(condition, Tensor):  # of sizes under torch.jit.trace
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Sequence[int], dilation: int, groups: int
) -> Tensor:
    top, bottom, left, right = padding
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _surely(top == bottom) and _surely(left == right):
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


def _normalize(z: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return z
    mean, var, weight, bias, eps = norm
    # One dtype for all four: F.batch_norm takes float32 parameters beside a 16-bit input, but no mixture of them.
    dtype = _wide(z.dtype)
    mean, var = mean.to(dtype), var.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if mean.requires_grad or var.requires_grad:
        # F.batch_norm treats running statistics as constants and would leave their gradients out in silence.
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        wide = (z.to(dtype) - mean[:, None, None]) * scale[:, None, None]
        return (wide if bias is None else wide + bias[:, None, None]).to(z.dtype)
    if (weight is None) != (bias is None):
        weight = torch.ones_like(mean) if weight is None else weight
        bias = torch.zeros_like(mean) if bias is None else bias
    return F.batch_norm(z, mean, var, weight, bias, training=False, eps=eps)


def _pool(y: Tensor) -> Tensor:
    return y.mean((2, 3), dtype=_wide(y.dtype))


def _excite(
    pooled: Tensor,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    activation: str,
    gate_activation: str,
    dtype: torch.dtype,
) -> Tensor:
    hidden = F.linear(pooled.to(dtype), w_reduce.flatten(1).to(dtype), None if b_reduce is None else b_reduce.to(dtype))
    hidden = activate(hidden, activation)
    logits = F.linear(hidden, w_expand.flatten(1).to(dtype), None if b_expand is None else b_expand.to(dtype))
    return apply_gate(logits, gate_activation)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _channels_last(t: Tensor) -> Tensor:
    # Tensor.contiguous(memory_format=...) leaves the strides of axes of size 1 as they are; clone writes them exactly,
    # and in this form, unlike with memory_format=torch.channels_last, it also works under torch.vmap.
    _, channels, height, width = t.shape
    exact = (height * width * channels, 1, width * channels, channels)
    if all(_surely(actual == wanted) for actual, wanted in zip(t.stride(), exact, strict=True)):
        return t
    return t.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)

"""The steps of a fused training block: what its forward and its backward do between two matrix products.

Every function here is plain PyTorch on any device and in any floating dtype, and the compiled kernel of the same
meaning, of the CPU or of CUDA, where there is one. Images are (N, H, W, C) and contiguous, the memory of channels_last.
What is applied to every element is computed in float32 (float64 where the image is), `wide(dtype)`; sums over pixels,
and what is computed from them per channel, in float64, as PyTorch's batch norm does on a CPU: a gradient is what
differences of them leave.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import _library
from effkernels.ops import _tf32, backends
from effkernels.ops.reference import activate, apply_gate

aten: Any = torch.ops.aten


class FoldedNorm(NamedTuple):
    """A norm of which scale = weight * inverse_deviation is computed: (t - mean) * scale + bias; each (C,)."""

    mean: Tensor
    inverse_deviation: Tensor
    scale: Tensor
    bias: Tensor


class Coefficients(NamedTuple):
    """The gradient of a norm's input: alpha * dy + beta * (t - mean) + delta; each (C,)."""

    alpha: Tensor
    beta: Tensor
    delta: Tensor


class GradientSums(NamedTuple):
    """Sums over the pixels of each image and channel, each (N, C), for y = activation(norm(t)) and its gradient g.

    With h = (t - mean) * inverse_deviation and a' the derivative of the activation at norm(t):
    sum y, sum g y, sum g a', sum a', sum g a' h, sum a' h.
    """

    y: Tensor
    gy: Tensor
    ga: Tensor
    a: Tensor
    gah: Tensor
    ah: Tensor


@contextmanager
def by_kernels() -> Iterator[None]:
    """Let tensors of the meta device take the kernels' operators in this thread, so that a plan can record them."""
    _planning.active = True
    try:
        yield
    finally:
        _planning.active = False


_planning = threading.local()

_HAS_CUDA_KERNELS = _library.is_loaded() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "effkernels::training_statistics", "CUDA"
)


def _has_kernel(t: Tensor) -> bool:
    if t.is_meta:
        return getattr(_planning, "active", False) and backends.selected() != "reference"
    if t.dtype not in backends.DTYPES or t.numel() == 0 or not _library.is_loaded():
        return False
    if t.is_cpu:
        return backends.selected() in ("auto", "cpu")
    if not (t.is_cuda and _HAS_CUDA_KERNELS and backends.selected() in ("auto", "cuda")):
        return False
    return backends.can_run_cuda("pointwise_bn_act", device=t.device, dtype=t.dtype).ok


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> FoldedNorm:
    """The norm of these statistics, (C,) each, in their dtype."""
    inverse_deviation = torch.rsqrt(var + eps)
    scale = inverse_deviation if weight is None else inverse_deviation * weight.to(mean.dtype)
    return folded(mean, inverse_deviation, scale, bias)


def folded(mean: Tensor, inverse_deviation: Tensor, scale: Tensor, bias: Tensor | None) -> FoldedNorm:
    """The norm of which everything but the bias is in the statistics' dtype."""
    return FoldedNorm(mean, inverse_deviation, scale, torch.zeros_like(mean) if bias is None else bias.to(mean.dtype))


def statistics(t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of t (N, H, W, C)."""
    if _has_kernel(t):
        return torch.ops.effkernels.training_statistics(t)  # type: ignore[no-any-return]
    if t.numel() == 0:  # all of the batch is in other processes
        nothing = t.new_zeros(t.shape[3], dtype=wide(t.dtype))
        return nothing, nothing
    var, mean = torch.var_mean(t.to(wide(t.dtype)), (0, 1, 2), correction=0)
    return mean, var


def norm_act(
    t: Tensor, norm: FoldedNorm, activation: str, factor: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(t)) * factor + residual in t's dtype; t, residual: (N, H, W, C), factor: (N, C)."""
    if _has_kernel(t):
        return torch.ops.effkernels.training_norm_act(t, *norm, activation, factor, residual)  # type: ignore[no-any-return]
    y = activate(_normalised(t, norm), activation)
    if factor is not None:
        y = y * factor.to(y.dtype)[:, None, None, :]
    if residual is not None:
        y = y + residual
    return y.to(t.dtype)


def squeeze(t: Tensor, norm: FoldedNorm, activation: str) -> Tensor:
    """The means (N, C) of activation(norm(t)) over the pixels of an image."""
    if _has_kernel(t):
        return torch.ops.effkernels.training_squeeze(t, *norm, activation)  # type: ignore[no-any-return]
    return activate(_normalised(t, norm), activation).mean((1, 2), dtype=torch.float64)


def depthwise(
    t: Tensor,
    norm: FoldedNorm | None,
    activation: str,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution of activation(norm(t)), or of t where there is no norm; (N, H', W', C), mean, variance."""
    if _has_kernel(t) and _is_plain_depthwise(t, weight, padding, dilation):
        arguments = (None,) * 4 if norm is None else norm
        bias = None if bias is None else bias.float()
        return torch.ops.effkernels.training_depthwise(  # type: ignore[no-any-return]
            t, *arguments, activation, weight.contiguous(), bias, stride, padding
        )
    y = _padded(t if norm is None else norm_act(t, norm, activation), padding)
    z = F.conv2d(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype), stride, 0, dilation, y.shape[1])
    z = nhwc(z)
    return z, *statistics(z)


def gradient_sums(
    g: Tensor, t: Tensor, norm: FoldedNorm, activation: str, factor: Tensor | None = None, with_y: bool = False
) -> tuple[GradientSums, Tensor]:
    """The sums of `GradientSums`, and y * factor (N, H, W, C) in t's dtype where it is asked for (else nothing)."""
    if _has_kernel(t):
        found, y = torch.ops.effkernels.training_gradient_sums(g, t, *norm, activation, factor, with_y)
        return GradientSums(*found), y
    z, g = _normalised(t, norm), g.to(wide(g.dtype))
    y, slope = activate(z, activation), _activation_backward(torch.ones_like(z), z, activation)
    h, gs = (t - norm.mean) * norm.inverse_deviation, g * slope
    sums = GradientSums(*(s.sum((1, 2), dtype=torch.float64) for s in (y, g * y, gs, slope, gs * h, slope * h)))
    if factor is not None:
        y = y * factor.to(y.dtype)[:, None, None, :]
    return sums, y.to(t.dtype) if with_y else y.new_empty(0)


def depthwise_backward(
    g: Tensor,
    z: Tensor,
    z_norm: FoldedNorm,
    z_activation: str,
    factor: Tensor | None,
    offset: Tensor | None,
    coefficients: Coefficients,
    t: Tensor,
    norm: FoldedNorm | None,
    activation: str,
    weight: Tensor,
    stride: int,
    padding: Sequence[int],
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward of a depthwise convolution and of the activations on both of its sides.

    Args:
        g: (N, H', W', C), the gradient of factor * activation(z_norm(z)).
        z: the result of the convolution, before its norm.
        factor, offset: (N, C) or None; the gradient of the activation's result is g * factor + offset.
        coefficients: of the gradient of z_norm's input.
        t, norm, activation: of the input, as `depthwise` takes them.

    Returns:
        The gradient of norm(t), or of t where there is no norm, in t's dtype; that of the weight, in the wide dtype;
        the sums (C,) of the first and of the first times (t - mean) * inverse_deviation.
    """
    one_activation = norm is None or activation == z_activation
    if _has_kernel(t) and one_activation and _is_plain_depthwise(t, weight, padding, dilation):
        arguments = (None,) * 4 if norm is None else norm
        dx, dweight, sums = torch.ops.effkernels.training_depthwise_backward(
            g, z, *z_norm, z_activation, factor, offset, *coefficients, t, *arguments, activation,
            weight.contiguous(), stride, padding,
        )  # fmt: skip
        return (dx, dweight, *sums) if norm is not None else (dx, dweight, sums, sums)
    dy = g.to(wide(g.dtype))
    if factor is not None:
        dy = dy * factor[:, None, None, :]
    if offset is not None:
        dy = dy + offset[:, None, None, :]
    dy = _activation_backward(dy, _normalised(z, z_norm), z_activation)
    dz = (coefficients.alpha * dy + coefficients.beta * (z - z_norm.mean) + coefficients.delta).to(z.dtype)
    y = _padded(t if norm is None else norm_act(t, norm, activation), padding)
    dx, dweight, _ = aten.convolution_backward(
        nchw(dz), y, weight.to(y.dtype), None, [stride] * 2, [0, 0], [dilation] * 2, False, [0, 0], y.shape[1],
        [True, True, False],
    )  # fmt: skip
    top, _, left, _ = padding
    dx = nhwc(dx[:, :, top : top + t.shape[1], left : left + t.shape[2]])
    if norm is None:
        nothing = dx.new_empty(0)
        return dx, dweight.to(wide(t.dtype)), nothing, nothing
    dx = _activation_backward(dx.to(wide(t.dtype)), _normalised(t, norm), activation)
    return dx.to(t.dtype), dweight.to(wide(t.dtype)), *_sums(dx, t, norm)


def coefficients_of(
    norm: FoldedNorm, batch_statistics: bool, count: int | Tensor, dy: Tensor, dyh: Tensor
) -> Coefficients:
    """Of the gradient of a norm's input, from the sums (C,) of dy and of dy * h over `count` pixels of a batch.

    A norm that uses running statistics does not differentiate through them.
    """
    dtype = norm.scale.dtype
    if not batch_statistics:
        zeros = torch.zeros_like(norm.scale)
        return Coefficients(norm.scale, zeros, zeros)
    of_mean, of_h = (torch.stack((dy, dyh)) * (norm.scale.double() * (-1.0 / count))).to(dtype)
    return Coefficients(norm.scale, of_h * norm.inverse_deviation, of_mean)


def norm_backward(
    dy: Tensor,
    t: Tensor,
    norm: FoldedNorm,
    coefficients: Coefficients,
    factor: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """The gradient of a norm's input t (N, H, W, C), in its dtype, where dy is that of factor * activation(norm(t))."""
    if _has_kernel(t):
        return torch.ops.effkernels.training_norm_backward(  # type: ignore[no-any-return]
            dy, t, *norm, activation, *coefficients, factor
        )
    alpha = coefficients.alpha
    if factor is not None:
        alpha = (factor.to(alpha.dtype) * alpha)[:, None, None, :]
    dy = _activation_backward(dy.to(wide(t.dtype)), _normalised(t, norm), activation)
    return (alpha * dy + coefficients.beta * (t - norm.mean) + coefficients.delta).to(t.dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """1x1 convolution of x (N, H, W, Cin) by weight (Cout, Cin, 1, 1), plus the residual."""
    if _has_kernel(x):
        return nhwc(_product(nchw(x), weight.to(x.dtype), bias, None if residual is None else nchw(residual)))
    matrix = weight.reshape(weight.shape[:2]).to(x.dtype)
    y = F.linear(x, matrix, None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual


def pointwise_input_gradient(dz: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """dz (N, H, W, Cout) @ weight (Cout, Cin, 1, 1) + residual."""
    if _has_kernel(dz):
        turned = weight.to(dz.dtype).transpose(0, 1).contiguous()
        return nhwc(_product(nchw(dz), turned, None, None if residual is None else nchw(residual)))
    matrix = weight.reshape(weight.shape[:2]).to(dz.dtype)
    shape = (*dz.shape[:3], matrix.shape[1])
    rows = dz.reshape(-1, dz.shape[3])
    if residual is None:
        return torch.mm(rows, matrix).reshape(shape)
    return torch.addmm(residual.reshape(-1, matrix.shape[1]), rows, matrix).reshape(shape)


def pointwise_weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    """The gradient (Cout, Cin, 1, 1) of the weight of a 1x1 convolution, in x's dtype."""
    if x.is_cuda:  # a product of two matrices as they are: cuDNN may convert or pad them, and add by atomics
        return torch.mm(dz.flatten(0, 2).t(), x.flatten(0, 2))[:, :, None, None]
    like = x.new_empty(dz.shape[3], x.shape[3], 1, 1)
    nothing = [0, 0]
    return aten.convolution_backward(  # type: ignore[no-any-return]
        nchw(dz), nchw(x), like, None, [1, 1], nothing, [1, 1], False, nothing, 1, [False, True, False]
    )[1]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return torch.ops.effkernels.pointwise_bn_act(  # type: ignore[no-any-return]
        x, weight, bias, None, None, None, None, 0.0, None, residual, "identity", _tf32.resolve(None, x)
    )


class Excitation(NamedTuple):
    """The parameters of squeeze-and-excitation, in float64 on a CPU, as the means are: they are few. Elsewhere wide."""

    w_reduce: Tensor
    b_reduce: Tensor | None
    w_expand: Tensor
    b_expand: Tensor | None
    activation: str
    gate: str


def excite(pooled: Tensor, e: Excitation) -> Tensor:
    """The gate (N, C) of the means (N, C)."""
    hidden = activate(F.linear(pooled.to(e.w_reduce.dtype), e.w_reduce, e.b_reduce), e.activation)
    return apply_gate(F.linear(hidden, e.w_expand, e.b_expand), e.gate)


def excite_backward(
    dgate: Tensor, pooled: Tensor, e: Excitation
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The gradients of the means, and of w_reduce, b_reduce, w_expand and b_expand."""
    pooled, dgate = pooled.to(e.w_reduce.dtype), dgate.to(e.w_reduce.dtype)
    before = F.linear(pooled, e.w_reduce, e.b_reduce)
    hidden = activate(before, e.activation)
    logits = F.linear(hidden, e.w_expand, e.b_expand)
    if e.gate == "sigmoid":
        dlogits = aten.sigmoid_backward(dgate, torch.sigmoid(logits))
    else:
        dlogits = aten.hardsigmoid_backward(dgate, logits)
    dbefore = _activation_backward(dlogits @ e.w_expand, before, e.activation)
    parameters = (dbefore.t() @ pooled, dbefore.sum(0), dlogits.t() @ hidden, dlogits.sum(0))
    return dbefore @ e.w_reduce, parameters


def nhwc(t: Tensor) -> Tensor:
    """(N, C, H, W) as a contiguous (N, H, W, C); a view where t is channels_last."""
    return t.permute(0, 2, 3, 1).contiguous()


def nchw(t: Tensor) -> Tensor:
    """A contiguous (N, H, W, C) as (N, C, H, W) with channels_last strides."""
    return t.permute(0, 3, 1, 2)


def _sums(dy: Tensor, t: Tensor, norm: FoldedNorm) -> tuple[Tensor, Tensor]:
    h = (t - norm.mean) * norm.inverse_deviation
    return dy.sum((0, 1, 2), dtype=torch.float64), (dy * h).sum((0, 1, 2), dtype=torch.float64)


def _is_plain_depthwise(t: Tensor, weight: Tensor, padding: Sequence[int], dilation: int) -> bool:
    """Whether the kernels compute it: those of the CPU hold rows of the image in a cache."""
    height, width = weight.shape[2:]
    pads = max(padding[:2]) < height and max(padding[2:]) < width
    return dilation == 1 and pads and max(height, width) <= 13 and t.shape[2] <= 4096


def _padded(t: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(nchw(t), (left, right, top, bottom))


def _normalised(t: Tensor, norm: FoldedNorm) -> Tensor:
    return (t - norm.mean) * norm.scale + norm.bias


def _activation_backward(g: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient of z where g is that of activate(z, activation)."""
    if activation == "identity":
        return g
    if activation == "relu":
        return aten.threshold_backward(g, z, 0)  # type: ignore[no-any-return]
    if activation == "relu6":
        return aten.hardtanh_backward(g, z, 0.0, 6.0)  # type: ignore[no-any-return]
    if activation == "silu":
        return aten.silu_backward(g, z)  # type: ignore[no-any-return]
    if activation == "hard_swish":
        return aten.hardswish_backward(g, z)  # type: ignore[no-any-return]
    return aten.gelu_backward(g, z, approximate="tanh" if activation == "gelu_tanh" else "none")  # type: ignore[no-any-return]

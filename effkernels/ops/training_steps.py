"""The steps of a fused training block: what its forward and its backward do between two matrix products.

Every function here is plain PyTorch on any device and in any floating dtype, and the kernel of the same meaning, of
the CPU, of CUDA or in Triton, where there is one. Images are (N, H, W, C) and contiguous, the memory of channels_last.
What is applied to every element is computed in float32 (float64 where the image is), `wide(dtype)`; sums over pixels,
and what is computed from them per channel, in float64, as PyTorch's batch norm does on a CPU: a gradient is what
differences of them leave.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effkernels import _library, triton
from effkernels.ops import _tf32, backends
from effkernels.ops.reference import activate, apply_gate

aten: Any = torch.ops.aten

# Channels that the kernels of csrc/cuda/training_vectors.h have shared memory for.
_MOST_EXCITED = 12 << 10
_MOST_PRODUCT_CHANNELS = 16 << 10


class FoldedNorm(NamedTuple):
    """A norm of which scale = weight * inverse_deviation is computed: (t - mean) * scale + bias; each (C,)."""

    mean: Tensor
    inverse_deviation: Tensor
    scale: Tensor
    bias: Tensor


class NormParameters(NamedTuple):
    """What a norm has besides its statistics: weight and bias, (C,) or None for 1 and 0."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


class NormVectors(NamedTuple):
    """Everything of a norm by the statistics of a batch, the rows of a tensor (6, C) that the kernels write."""

    mean: Tensor
    variance: Tensor
    unbiased: Tensor
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


def _has_kernel(t: Tensor, name: str = "") -> bool:
    """Whether a compiled kernel takes t; `name`: of an operator that not all devices have."""
    if name and not t.is_meta:
        device = "CUDA" if t.is_cuda else "CPU"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"effkernels::{name}", device):
            return False
    if t.is_meta:
        return getattr(_planning, "active", False) and backends.selected() != "reference"
    if t.dtype not in backends.DTYPES or t.numel() == 0 or not _library.is_loaded():
        return False
    if t.is_cpu:
        return backends.selected() in ("auto", "cpu")
    if not (t.is_cuda and _HAS_CUDA_KERNELS and backends.selected() in ("auto", "cuda")):
        return False
    return backends.can_run_cuda("pointwise_bn_act", device=t.device, dtype=t.dtype).ok


def _kernel(name: str, t: Tensor) -> Any:
    """The kernel of a step that takes t: the compiled operator, or Triton's function of its signature; None: PyTorch.

    Raises:
        RuntimeError: Triton was asked for and cannot run there; the message has the reason.
    """
    if _has_kernel(t):
        return getattr(torch.ops.effkernels, name)
    return triton.training_step(name) if _runs_triton(name, t) else None


def _product_kernel(x: Tensor) -> Any:
    """The operator `pointwise_bn_act` that takes x, compiled or of Triton; None: PyTorch."""
    if _has_kernel(x):
        return torch.ops.effkernels.pointwise_bn_act
    return torch.ops.effkernels_triton.pointwise_bn_act if _runs_triton("pointwise_bn_act", x) else None


def _runs_triton(name: str, t: Tensor) -> bool:
    """Whether Triton runs a step for t that the compiled library does not run."""
    asked = backends.selected()
    if t.is_meta or t.numel() == 0 or asked not in ("auto", "triton") or (asked == "auto" and not t.is_cuda):
        return False
    decision = backends.can_run_triton(name, device=t.device, dtype=t.dtype)
    if asked == "triton" and not decision.ok:
        raise RuntimeError(f"{name}: backend='triton' was asked for and cannot run: {decision.reason}")
    return decision.ok


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> FoldedNorm:
    """The norm of these statistics, (C,) each, in their dtype."""
    inverse_deviation = torch.rsqrt(var + eps)
    scale = inverse_deviation if weight is None else inverse_deviation * weight.to(mean.dtype)
    bias = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
    return FoldedNorm(mean, inverse_deviation, scale, bias)


def fold(mean: Tensor, variance: Tensor, unbiased: Tensor, own: NormParameters) -> Tensor:
    """The rows (6, C) of `NormVectors` from statistics (C,) that are known."""
    norm = make_norm(mean, variance, *own)
    return torch.stack((mean, variance, unbiased, *norm[1:]))


def norm_of(vectors: Tensor) -> FoldedNorm:
    """The norm of the rows (6, C) of `NormVectors`; views."""
    rows = NormVectors(*vectors.unbind())
    return FoldedNorm(rows.mean, rows.inverse_deviation, rows.scale, rows.bias)


def statistics(t: Tensor, own: NormParameters = NormParameters()) -> Tensor:  # noqa: B008  it cannot change
    """The norm of t (N, H, W, C) by its statistics, as rows (6, C) of `NormVectors`."""
    if (kernel := _kernel("training_statistics", t)) is not None:
        return kernel(t, *_of_kernels(own))  # type: ignore[no-any-return]
    if t.numel() == 0:  # all of the batch is in other processes
        nothing = t.new_zeros(t.shape[3], dtype=wide(t.dtype))
        return fold(nothing, nothing, nothing, own)
    var, mean = torch.var_mean(t.to(wide(t.dtype)), (0, 1, 2), correction=0)
    count = t.numel() // t.shape[3]
    return fold(mean, var, var * (count / (count - 1)) if count > 1 else var, own)


def _of_kernels(own: NormParameters) -> NormParameters:
    """As the kernels take it: in any dtype that they have."""
    weight, bias = (t if t is None or t.dtype in backends.DTYPES else t.float() for t in (own.weight, own.bias))
    return NormParameters(weight, bias, own.eps)


def has_running_kernel(vectors: Tensor) -> bool:
    """Whether `update_running` takes norms with these rows (6, C)."""
    return _has_kernel(vectors, "training_running")


def update_running(running: list[Tensor], vectors: list[Tensor], counts: list[Tensor], momenta: list[float]) -> None:
    """Update the running statistics of at most 4 norms after a batch, in one launch.

    Args:
        running: mean and variance (C,) of each norm; changed in place.
        vectors: rows (6, C) of `NormVectors` of each norm.
        counts: numbers of batches, of those norms that count them; changed in place.
        momenta: of each norm.
    """
    torch.ops.effkernels.training_running(running, vectors, counts, momenta)


def norm_act(
    t: Tensor, norm: FoldedNorm, activation: str, factor: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """activation(norm(t)) * factor + residual in t's dtype; t, residual: (N, H, W, C), factor: (N, C)."""
    if (kernel := _kernel("training_norm_act", t)) is not None:
        return kernel(t, *norm, activation, factor, residual)  # type: ignore[no-any-return]
    y = activate(_normalised(t, norm), activation)
    if factor is not None:
        y = y * factor.to(y.dtype)[:, None, None, :]
    if residual is not None:
        y = y + residual
    return y.to(t.dtype)


def squeeze(t: Tensor, norm: FoldedNorm, activation: str) -> Tensor:
    """The means (N, C) of activation(norm(t)) over the pixels of an image."""
    if (kernel := _kernel("training_squeeze", t)) is not None:
        return kernel(t, *norm, activation)  # type: ignore[no-any-return]
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
    own: NormParameters = NormParameters(),  # noqa: B008  it cannot change
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution of activation(norm(t)), or of t where there is no norm.

    Returns:
        z (N, H', W', C), and its norm as rows (6, C) of `NormVectors`; `own` are the parameters of that norm.
    """
    kernel = _kernel("training_depthwise", t) if _is_plain_depthwise(t, weight, padding, dilation) else None
    if kernel is not None:
        arguments = (None,) * 4 if norm is None else norm
        bias = None if bias is None else bias.float()
        return kernel(  # type: ignore[no-any-return]
            t, *arguments, activation, weight.contiguous(), bias, stride, padding, *_of_kernels(own)
        )
    y = _padded(t if norm is None else norm_act(t, norm, activation), padding)
    z = F.conv2d(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype), stride, 0, dilation, y.shape[1])
    z = nhwc(z)
    return z, statistics(z, own)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: FoldedNorm | None = None,
    activation: str = "identity",
    factor: Tensor | None = None,
    own: NormParameters | None = NormParameters(),  # noqa: B008  it cannot change
) -> tuple[Tensor, Tensor]:
    """1x1 convolution of activation(norm(x)) * factor, or of x where there is no norm.

    Args:
        x: (N, H, W, Cin); factor: (N, Cin).
        weight: (Cout, Cin, 1, 1), bias (Cout,).
        own: parameters of the norm of the result; None: that norm does not use the statistics of the batch.

    Returns:
        z (N, H, W, Cout), and its norm as rows (6, C) of `NormVectors`, which mean nothing where `own` is None.
    """
    if _has_kernel(x, "training_product"):
        arguments = (None,) * 4 if norm is None else norm
        bias = bias if bias is None or bias.dtype in backends.DTYPES else bias.float()
        return torch.ops.effkernels.training_product(  # type: ignore[no-any-return]
            x, weight.to(x.dtype).contiguous(), bias, *arguments, activation, factor,
            *_of_kernels(own or NormParameters()), _tf32.resolve(None, x),
        )  # fmt: skip
    z = pointwise(x if norm is None else norm_act(x, norm, activation, factor), weight, bias)
    return z, z.new_empty(0) if own is None else statistics(z, own)


def gradient_sums(
    g: Tensor, t: Tensor, norm: FoldedNorm, activation: str, factor: Tensor | None = None, with_y: bool = False
) -> tuple[Tensor, Tensor]:
    """The sums of `GradientSums`, (6, N, C), and y * factor (N, H, W, C) in t's dtype if asked for, else nothing."""
    if (kernel := _kernel("training_gradient_sums", t)) is not None:
        return kernel(g, t, *norm, activation, factor, with_y)  # type: ignore[no-any-return]
    z, g = _normalised(t, norm), g.to(wide(g.dtype))
    y, slope = activate(z, activation), _activation_backward(torch.ones_like(z), z, activation)
    h, gs = (t - norm.mean) * norm.inverse_deviation, g * slope
    sums = torch.stack([s.sum((1, 2), dtype=torch.float64) for s in (y, g * y, gs, slope, gs * h, slope * h)])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a depthwise convolution and of the activations on both of its sides.

    Args:
        g: (N, H', W', C), the gradient of factor * activation(z_norm(z)).
        z: the result of the convolution, before its norm.
        factor, offset: (N, C) or None; the gradient of the activation's result is g * factor + offset.
        coefficients: of the gradient of z_norm's input.
        t, norm, activation: of the input, as `depthwise` takes them.

    Returns:
        The gradient of norm(t), or of t where there is no norm, in t's dtype; that of the weight, in the wide dtype;
        the sums (2, C) of the first and of the first times (t - mean) * inverse_deviation, nothing without a norm.
    """
    one_activation = norm is None or activation == z_activation
    fits = one_activation and _is_plain_depthwise(t, weight, padding, dilation)
    kernel = _kernel("training_depthwise_backward", t) if fits else None
    if kernel is not None:
        arguments = (None,) * 4 if norm is None else norm
        return kernel(  # type: ignore[no-any-return]
            g, z, *z_norm, z_activation, factor, offset, *coefficients, t, *arguments, activation,
            weight.contiguous(), stride, padding,
        )  # fmt: skip
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
        return dx, dweight.to(wide(t.dtype)), dx.new_empty(0)
    dx = _activation_backward(dx.to(wide(t.dtype)), _normalised(t, norm), activation)
    return dx.to(t.dtype), dweight.to(wide(t.dtype)), _sums(dx, t, norm)


class NormGradient(NamedTuple):
    """The gradients of a norm's weight and bias, (C,), and what the gradient of its input needs."""

    weight: Tensor
    bias: Tensor
    coefficients: Coefficients


def norm_gradient(
    sums: Tensor,
    norm: FoldedNorm,
    pixels: int,
    batch_statistics: bool,
    own: NormParameters,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
    joint: Callable[[Tensor, Tensor], tuple[int | Tensor, Tensor, Tensor]] | None = None,
) -> NormGradient:
    """The gradients of a norm from sums over `pixels` pixels of a batch.

    Args:
        sums: (6, N, C) of `gradient_sums`, or (2, C) of `depthwise_backward`.
        batch_statistics: False for a norm that uses running statistics, and does not differentiate through them.
        own: the parameters, whose dtypes the gradients have; where there are none they are wide.
        factor, offset: (N, C) or None; the gradient of the norm's result is factor * g a' + offset * a'.
        joint: from two sums (C,) of this process to number of pixels and sums of all that share the statistics.
    """
    if joint is None and _has_kernel(norm.scale, "training_norm_gradient"):
        parameters = _of_kernels(own)
        weight, bias, vectors = torch.ops.effkernels.training_norm_gradient(
            sums, factor, offset, norm.scale, norm.inverse_deviation, pixels, batch_statistics, *parameters[:2]
        )
        return NormGradient(weight, bias, Coefficients(norm.scale, *vectors))
    total, total_h = totals(sums, factor, offset)
    everywhere = (pixels, total, total_h) if joint is None else joint(total, total_h)
    weight, bias = (
        t.to(norm.scale.dtype if like is None else like.dtype) for t, like in ((total_h, own.weight), (total, own.bias))
    )
    return NormGradient(weight, bias, coefficients_of(norm, batch_statistics, *everywhere))


def totals(sums: Tensor, factor: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums (C,) over a batch of the gradient of a norm's result, and of it times h; as `norm_gradient`."""
    if sums.dim() == 2:
        return sums[0], sums[1]
    found = GradientSums(*sums)
    total, total_h = found.ga, found.gah
    if factor is not None:
        total, total_h = factor * total, factor * total_h
    if offset is not None:
        total, total_h = total + offset * found.a, total_h + offset * found.ah
    return total.sum(0), total_h.sum(0)


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
    if (kernel := _kernel("training_norm_backward", t)) is not None:
        return kernel(dy, t, *norm, activation, *coefficients, factor)  # type: ignore[no-any-return]
    alpha = coefficients.alpha
    if factor is not None:
        alpha = (factor.to(alpha.dtype) * alpha)[:, None, None, :]
    dy = _activation_backward(dy.to(wide(t.dtype)), _normalised(t, norm), activation)
    return (alpha * dy + coefficients.beta * (t - norm.mean) + coefficients.delta).to(t.dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """1x1 convolution of x (N, H, W, Cin) by weight (Cout, Cin, 1, 1), plus the residual."""
    if (kernel := _product_kernel(x)) is not None:
        return _product(kernel, x, weight.to(x.dtype), bias, residual)
    matrix = weight.reshape(weight.shape[:2]).to(x.dtype)
    y = F.linear(x, matrix, None if bias is None else bias.to(x.dtype))
    return y if residual is None else y + residual


def pointwise_input_gradient(dz: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """dz (N, H, W, Cout) @ weight (Cout, Cin, 1, 1) + residual."""
    if (kernel := _product_kernel(dz)) is not None:
        turned = weight.to(dz.dtype).transpose(0, 1).contiguous()
        return _product(kernel, dz, turned, None, residual)
    matrix = weight.reshape(weight.shape[:2]).to(dz.dtype)
    shape = (*dz.shape[:3], matrix.shape[1])
    rows = dz.reshape(-1, dz.shape[3])
    if residual is None:
        return torch.mm(rows, matrix).reshape(shape)
    return torch.addmm(residual.reshape(-1, matrix.shape[1]), rows, matrix).reshape(shape)


def product_weights(
    weight: Tensor, bias: Tensor | None, norm: FoldedNorm, coefficients: Coefficients, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights by which the gradient of a norm after a 1x1 convolution reaches the convolution's input.

    Args:
        weight: (Cout, Cin, 1, 1); bias (Cout,).
        norm, coefficients: of the norm after it.
        dtype: that the products are computed in.

    Returns:
        (alpha W)' as (Cin, Cout, 1, 1), W' beta W as (Cin, Cin, 1, 1), W' (delta + beta (bias - mean)) as (Cin,).
    """
    if _has_product_kernel(weight) and dtype == weight.dtype:
        return torch.ops.effkernels.training_product_weights(  # type: ignore[no-any-return]
            weight.contiguous(), bias, norm.mean, *coefficients
        )
    alpha, beta, delta = coefficients
    w = weight.flatten(1).to(wide(dtype))
    shift = -norm.mean if bias is None else bias.to(norm.mean.dtype) - norm.mean
    scaled, middle = (alpha[:, None] * w).t(), w.t() @ (beta[:, None] * w)
    return (
        scaled[:, :, None, None],
        middle[:, :, None, None],
        torch.addmv(w.t() @ delta, (beta[:, None] * w).t(), shift),
    )


def product_gradient(
    products: Tensor,
    moments: tuple[Tensor, Tensor, bool] | None,
    pixels: int,
    weight: Tensor,
    bias: Tensor | None,
    norm: FoldedNorm,
    coefficients: Coefficients,
) -> Tensor:
    """The gradient of a 1x1 convolution's weight through the norm after it, as `training_product` explains.

    Args:
        products: g'x (Cout, Cin).
        moments: mean (Cin,) and sum of products (Cin, Cin) of the input, and whether those are of x - mean; None for a
            norm that uses running statistics.
        pixels: of the batch.
    """
    if _has_product_kernel(weight):
        mean, squares, centred = (None, None, False) if moments is None else moments
        return torch.ops.effkernels.training_product_gradient(  # type: ignore[no-any-return]
            weight.contiguous(), bias, norm.mean, *coefficients, products, mean, squares, pixels, centred
        )
    alpha, beta, delta = coefficients
    dweight = alpha[:, None] * products
    if moments is None:
        return dweight
    mean, squares, centred = moments
    if not centred:
        squares = squares - pixels * mean[:, None] * mean
    w = weight.flatten(1).to(mean.dtype)
    shift = -norm.mean if bias is None else bias.to(norm.mean.dtype) - norm.mean
    of_mean = delta + beta * (torch.mv(w, mean) + shift)
    return dweight + torch.addmm((pixels * of_mean)[:, None] * mean, beta[:, None] * w, squares)


def _has_product_kernel(weight: Tensor) -> bool:
    fits = max(weight.shape[:2]) <= _MOST_PRODUCT_CHANNELS
    return fits and _has_kernel(weight, "training_product_weights")


def pointwise_weight_gradient(dz: Tensor, x: Tensor) -> Tensor:
    """The gradient (Cout, Cin, 1, 1) of the weight of a 1x1 convolution, in x's dtype."""
    if x.is_cuda:  # a product of two matrices as they are: cuDNN may convert or pad them, and add by atomics
        return torch.mm(dz.flatten(0, 2).t(), x.flatten(0, 2))[:, :, None, None]
    like = x.new_empty(dz.shape[3], x.shape[3], 1, 1)
    nothing = [0, 0]
    return aten.convolution_backward(  # type: ignore[no-any-return]
        nchw(dz), nchw(x), like, None, [1, 1], nothing, [1, 1], False, nothing, 1, [False, True, False]
    )[1]


def _product(kernel: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    added, tf32 = None if residual is None else nchw(residual), _tf32.resolve(None, x)
    return nhwc(kernel(nchw(x), weight, bias, None, None, None, None, 0.0, None, added, "identity", tf32))


class Excitation(NamedTuple):
    """The parameters of squeeze-and-excitation, of its two 1x1 convolutions."""

    w_reduce: Tensor
    b_reduce: Tensor | None
    w_expand: Tensor
    b_expand: Tensor | None
    activation: str
    gate: str


def excite(pooled: Tensor, e: Excitation) -> Tensor:
    """The gate (N, C) of the means (N, C)."""
    if _has_excite_kernel(e):
        return torch.ops.effkernels.training_excite(pooled, *_contiguous(e))  # type: ignore[no-any-return]
    e = _as_computed(e)
    hidden = activate(F.linear(pooled.to(e.w_reduce.dtype), e.w_reduce, e.b_reduce), e.activation)
    return apply_gate(F.linear(hidden, e.w_expand, e.b_expand), e.gate)


def excite_backward(sums: Tensor, pixels: int, e: Excitation) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The gradients of what was averaged, (N, C), and of w_reduce, b_reduce, w_expand and b_expand.

    Args:
        sums: (6, N, C) of `gradient_sums`.
        pixels: of an image.
    """
    if _has_excite_kernel(e):
        offset, *of_parameters = torch.ops.effkernels.training_excite_backward(sums, pixels, *_contiguous(e))
        return offset, tuple(of_parameters)
    e = _as_computed(e)
    found = GradientSums(*sums)
    pooled, dgate = (found.y * (1.0 / pixels)).to(e.w_reduce.dtype), found.gy.to(e.w_reduce.dtype)
    before = F.linear(pooled, e.w_reduce, e.b_reduce)
    hidden = activate(before, e.activation)
    logits = F.linear(hidden, e.w_expand, e.b_expand)
    if e.gate == "sigmoid":
        dlogits = aten.sigmoid_backward(dgate, torch.sigmoid(logits))
    else:
        dlogits = aten.hardsigmoid_backward(dgate, logits)
    dbefore = _activation_backward(dlogits @ e.w_expand, before, e.activation)
    parameters = (dbefore.t() @ pooled, dbefore.sum(0), dlogits.t() @ hidden, dlogits.sum(0))
    return (dbefore @ e.w_reduce) * (1.0 / pixels), parameters


def _has_excite_kernel(e: Excitation) -> bool:
    channels = sum(e.w_reduce.shape[:2])
    same = all(t is None or t.dtype in backends.DTYPES for t in e[:4])
    return same and channels <= _MOST_EXCITED and _has_kernel(e.w_reduce, "training_excite")


def _contiguous(e: Excitation) -> tuple[Any, ...]:
    w_reduce, w_expand = e.w_reduce.contiguous(), e.w_expand.contiguous()
    return w_reduce, e.b_reduce, w_expand, e.b_expand, e.activation, e.gate


def _as_computed(e: Excitation) -> Excitation:
    """The parameters as matrices in float64 on a CPU, as the means are: they are few. Elsewhere wide."""
    dtype = torch.float64 if e.w_reduce.is_cpu else wide(e.w_reduce.dtype)
    w_reduce, w_expand = (t.flatten(1).to(dtype) for t in (e.w_reduce, e.w_expand))
    b_reduce, b_expand = (None if t is None else t.to(dtype) for t in (e.b_reduce, e.b_expand))
    return Excitation(w_reduce, b_reduce, w_expand, b_expand, e.activation, e.gate)


def nhwc(t: Tensor) -> Tensor:
    """(N, C, H, W) as a contiguous (N, H, W, C); a view where t is channels_last."""
    return t.permute(0, 2, 3, 1).contiguous()


def nchw(t: Tensor) -> Tensor:
    """A contiguous (N, H, W, C) as (N, C, H, W) with channels_last strides."""
    return t.permute(0, 3, 1, 2)


def _sums(dy: Tensor, t: Tensor, norm: FoldedNorm) -> Tensor:
    h = (t - norm.mean) * norm.inverse_deviation
    return torch.stack([s.sum((0, 1, 2), dtype=torch.float64) for s in (dy, dy * h)])


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

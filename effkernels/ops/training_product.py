"""Backward of a 1x1 convolution and of the norm after it, without the norm's input.

With t = x W' + b and dz = alpha g + beta (t - mean) + delta, the gradient of a norm's input, t is linear in x, so dz
need not be formed:

    dx = dz W  = g (alpha W) + x (W' beta W) + W' (delta + beta (b - mean))
    dW = dz' x = alpha (g' x) + beta (n W cov(x) + (W sum(x) + n (b - mean)) mean(x)') + delta sum(x)'

The matrices in the middle have the size of the input's channels, which are a fourth or a sixth of the output's in an
MBConv block. Neither t nor dz moves: a third of the bytes of the expansion's backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effkernels.ops import training_steps as steps
from effkernels.ops.training_steps import Coefficients, FoldedNorm, wide

_MOVED = 80  # multiply-adds in the time that a CPU needs to read two float32 numbers and to write one


def keeps_gradient(x: Tensor, channels: int) -> bool:
    """Return whether dz, of so many channels, is to be formed from x (N, H, W, Cin).

    No pixels have no mean, and on a CPU 16-bit products have no float32 result. A CPU multiplies the matrices in the
    middle in less time than it moves dz only where there are many pixels; a GPU everywhere that counts.
    """
    if x.numel() == 0 or (x.is_cpu and x.dtype in (torch.float16, torch.bfloat16)):
        return True
    pixels, width = x.numel() // x.shape[3], x.shape[3]
    return x.is_cpu and width * width * (channels + 2 * pixels) > _MOVED * pixels * channels


def product_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: FoldedNorm,
    coefficients: Coefficients,
    residual: Tensor | None,
    frozen: bool,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x (with `residual` added) and of the weight, each where it is wanted.

    Args:
        g: (N, H, W, Cout), the gradient of the norm's result.
        x: (N, H, W, Cin).
        weight: (Cout, Cin, 1, 1), bias (Cout,).
        norm: after the convolution.
        coefficients: of the gradient of the norm's input.
        residual: (N, H, W, Cin).
        frozen: the norm used its running statistics, so that dz = alpha g.
    """
    dx = dweight = None
    if wanted[0]:
        scaled, middle, shift = steps.product_weights(weight, bias, norm, coefficients, x.dtype)
        added = residual if frozen else steps.pointwise(x, middle, shift, residual)
        dx = steps.pointwise(g, scaled, None, added)
    if wanted[1]:
        pixels = x.numel() // x.shape[3]
        moments = None if frozen else _moments(x)
        dweight = steps.product_gradient(_weight_gradient(g, x), moments, pixels, weight, bias, norm, coefficients)
    return dx, dweight


def _moments(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Mean (C,) and sum of products (C, C) of the pixels of x (N, H, W, C), and whether those are of x - mean.

    A difference from the mean would be a float32 image where x has a 16-bit type. There the products are of x itself:
    the digits that they lose where a mean is large are fewer than x has lost.
    """
    mean = steps.NormVectors(*steps.statistics(x).unbind()).mean
    rows = x.reshape(-1, x.shape[3])
    if x.dtype != wide(x.dtype):
        return mean, torch.mm(rows.t(), rows, out_dtype=wide(x.dtype)), False
    rows = rows - mean
    return mean, rows.t() @ rows, True


def _weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g' x (Cout, Cin) in the wide dtype."""
    if g.dtype == wide(g.dtype):
        return steps.pointwise_weight_gradient(g, x).flatten(1)
    rows = g.reshape(-1, g.shape[3]).t()
    return torch.mm(rows, x.reshape(-1, x.shape[3]), out_dtype=wide(g.dtype))

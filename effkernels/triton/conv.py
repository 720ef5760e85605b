"""`conv_bn_act` in Triton: the stem by a kernel of its own, other shapes by PyTorch's convolution and one pass more.

The stem has so few input channels that all products of an output pixel fit one or a few steps of a matrix product. A
program takes ROWS output pixels of all images in order by COLUMNS output channels, and gathers the factors of a pixel,
tap (c, ky, kx) after tap in the order of the weight, from x by any strides, so that a contiguous NCHW image needs no
copy. Neighbouring pixels share most of their factors: those come from the L1 cache.

With many input channels a gather is no match for PyTorch's convolution, whose result is normed and activated in one
more pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from effkernels._norm import Norm
from effkernels.triton import _launch
from effkernels.triton._common import activate, load_float, scale_shift
from effkernels.triton.pointwise import EXACT_RUN, nearest_tf32

MOST_TAPS = EXACT_RUN  # input channels times kernel size that the kernel of the stem takes: one run of additions
_STEP = 32  # taps
_WIDEST_TILE = 32  # output channels of a program; with 64 the gather takes 240 registers and spills in float32
_WIDEST_BLOCK = 64  # channels of a program that norms and activates


class Tile(NamedTuple):
    """The tile of the stem's kernel: output pixels and channels of a program, taps of a step, and who computes."""

    rows: int
    columns: int
    step: int
    warps: int


def tile_of(taps: int, out_channels: int) -> Tile:
    """Return the tile for so many products per output: what compiles without a spill, not what was measured fastest."""
    return Tile(
        rows=64 if taps <= _STEP else 32,  # a loop over steps takes registers as well
        columns=min(_WIDEST_TILE, max(16, _launch.next_power_of_2(out_channels))),  # 16: the least that tl.dot takes
        step=16 if taps <= 16 else _STEP,
        warps=4,
    )


def candidates(taps: int, out_channels: int) -> tuple[Tile, ...]:
    """Return the tiles that `effkernels tune` may choose from, the one of `tile_of` first.

    Of the default's columns alone: with fewer, the gather of a thread takes all registers, and with more the sums do.
    """
    default = tile_of(taps, out_channels)
    found = [default]
    for rows in (32, 64) if taps > _STEP else (32, 64, 128):
        found += [default._replace(rows=rows, warps=warps) for warps in (4, 8)]
    found += [default._replace(step=step) for step in (16, 32)]
    return tuple(dict.fromkeys(found))


@triton.jit(do_not_specialize=["rows", "height", "width", "out_height", "out_width", "column_tiles", "out_vectors"])
def conv_kernel(
    x,
    weight,
    bias,
    norm_mean,
    norm_var,
    norm_weight,
    norm_bias,
    y,
    eps,
    rows,
    height,
    width,
    out_height,
    out_width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    pad_top,
    pad_left,
    column_tiles,
    out_vectors,
    TAPS: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    out_channels = out_vectors * VECTOR
    program = tl.program_id(0)
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < out_channels
    row = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_inside = row < rows
    top = row // out_width % out_height * STRIDE - pad_top
    left = row % out_width * STRIDE - pad_left
    pixel_x = x + (row // out_width // out_height * stride_n + top * stride_h + left * stride_w)[:, None]

    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, TAPS, STEP):
        tap = first + tl.arange(0, STEP)
        ky = tap // KERNEL_W % KERNEL_H
        kx = tap % KERNEL_W
        c = (tap // (KERNEL_W * KERNEL_H)).to(tl.int64)
        at_y = top[:, None] + ky[None, :]
        at_x = left[:, None] + kx[None, :]
        inside = row_inside[:, None] & (tap < TAPS)[None, :]
        inside = inside & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        offset = c * stride_c + ky.to(tl.int64) * stride_h + kx.to(tl.int64) * stride_w
        factor = tl.load(pixel_x + offset[None, :], mask=inside, other=0.0)
        weight_inside = (tap < TAPS)[:, None] & column_inside[None, :]
        weights = tl.load(weight + column[None, :] * TAPS + tap[:, None], mask=weight_inside, other=0.0).to(DTYPE)
        if ROUNDED:
            factor = nearest_tf32(factor)
            weights = nearest_tf32(weights)
        total = tl.dot(factor, weights, total, input_precision=PRECISION)

    scale, shift = scale_shift(column, column_inside, bias, norm_mean, norm_var, norm_weight, norm_bias, eps)
    value = activate(total * scale[None, :] + shift[None, :], ACTIVATION)
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(y + (row * out_channels)[:, None] + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "channel_vectors", "groups"])
def norm_act_kernel(
    z,
    bias,
    norm_mean,
    norm_var,
    norm_weight,
    norm_bias,
    y,
    eps,
    rows,
    channel_vectors,
    groups,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = activation(norm(z + bias)), both (rows, channels) and dense. A program takes ROWS rows by BLOCK channels."""
    program = tl.program_id(0)
    channels = channel_vectors * VECTOR
    c = program % groups * BLOCK + tl.arange(0, BLOCK)
    row = (program // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    offset = (row * channels)[:, None] + c[None, :]
    scale, shift = scale_shift(c, c < channels, bias, norm_mean, norm_var, norm_weight, norm_bias, eps)
    value = activate(load_float(z + offset, inside) * scale[None, :] + shift[None, :], ACTIVATION)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


def conv_bn_act(out: Tensor, *conv: Any) -> None:
    """Fill `out` (N, C_out, H', W'), exact channels_last; arguments as in effkernels.ops.conv_bn_act, checked."""
    x, weight, bias, norm, stride, padding, activation, _ = conv
    if weight[0].numel() <= MOST_TAPS:
        _run_direct(out, *conv)
        return
    top, bottom, left, right = padding
    # PyTorch's convolution pads both sides alike, so that the rest is padded before; its precision is PyTorch's own.
    padded = x if (top, left) == (bottom, right) else F.pad(x, (left, right, top, bottom))
    within = (top, left) if padded is x else (0, 0)
    z = F.conv2d(padded, weight.to(x.dtype), None, stride, within)
    z = z.permute(0, 2, 3, 1).contiguous()
    _, channels, height, width = out.shape
    rows = out.shape[0] * height * width
    vector = _launch.vector_of(out.dtype) if _launch.vectors_fit(channels, out) else 1
    block = min(_WIDEST_BLOCK, _launch.next_power_of_2(channels))
    groups, rows_of_program = _launch.divide_up(channels, block), 1024 // block * max(1, vector // 4)
    _launch.run(
        norm_act_kernel,
        (_launch.divide_up(rows, rows_of_program) * groups,),
        z,
        _launch.dense(bias),
        *_launch.dense_norm(norm),
        out,
        _launch.eps_of(norm),
        rows,
        channels // vector,
        groups,
        VECTOR=vector,
        ACTIVATION=_launch.activation_for(activation, out.dtype),
        ROWS=rows_of_program,
        BLOCK=block,
        num_warps=4,
    )


def _run_direct(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    stride: int,
    padding: Sequence[int],
    activation: str,
    allow_tf32: bool,
) -> None:
    images, channels, out_height, out_width = out.shape
    _, in_channels, kernel_h, kernel_w = weight.shape
    rows = images * out_height * out_width
    taps = in_channels * kernel_h * kernel_w
    vector = _launch.vector_of(out.dtype) if _launch.vectors_fit(channels, out) else 1
    tf32 = x.dtype == torch.float32 and allow_tf32
    shape = (rows, in_channels, channels, kernel_h, kernel_w, stride, int(tf32))
    tile = _launch.tuned("conv_bn_act", x, shape, lambda: candidates(taps, channels)) or tile_of(taps, channels)
    column_tiles = _launch.divide_up(channels, tile.columns)
    _launch.run(
        conv_kernel,
        (_launch.divide_up(rows, tile.rows) * column_tiles,),
        x,
        weight.contiguous(),
        _launch.dense(bias),
        *_launch.dense_norm(norm),
        out,
        _launch.eps_of(norm),
        rows,
        x.shape[2],
        x.shape[3],
        out_height,
        out_width,
        *x.stride(),
        padding[0],
        padding[2],
        column_tiles,
        channels // vector,
        TAPS=taps,
        KERNEL_H=kernel_h,
        KERNEL_W=kernel_w,
        STRIDE=stride,
        VECTOR=vector,
        ACTIVATION=_launch.activation_for(activation, out.dtype),
        PRECISION="tf32" if tf32 else "ieee",
        ROUNDED=tf32 and not _launch.INTERPRETED and torch.version.hip is None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEP=tile.step,
        num_warps=tile.warps,
    )


OPERATORS = {"conv_bn_act": conv_bn_act}

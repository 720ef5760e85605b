"""`pointwise_bn_act` and `pointwise_bn_act_pool` in Triton: a matrix product whose input is gated as it is read and
whose result is finished as it is written, or averaged over each image in place of that.

y (M x N) = epilogue((x * gate) (M x K) @ weight^T), M the pixels of all images, K and N the input and output channels,
weight (N x K) as stored. A program computes one tile of y with all of its k; programs that share rows of x are
neighbours, so that x comes from memory once and from L2 after that.

One kernel serves every shape. What the compiler must know for 16-byte accesses, that rows start at multiples of so many
elements, follows from channels and strides in vectors: 24 channels of 16 bits are 3 vectors of 8, where Triton's
own test for multiples of 16 would give up.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels._norm import Norm
from effkernels.triton import _common, _launch

# One chain of additions over 1152 channels would err twice as much as PyTorch's blocked product: exact float32 sums
# are taken in runs of so many channels. Tensor cores add several products at once and need none.
EXACT_RUN = 128
# Rows that a pooled tile adds up first; a divisor of every tile's rows.
POOL_RUN = tl.constexpr(8)
# Bytes of shared memory of a block that every GPU from compute capability 8.0 on has.
MOST_SHARED = 99 * 1024
# Below so many pixels per image, a tile takes rows of several images, each with a gate of its own.
FEWEST_PIXELS_OF_OWN_TILE = 32


class Tile(NamedTuple):
    """The tile of a product: rows and columns of y per program, channels of x per step, and who computes it."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """An image tensor as a matrix: pixel p of image n is at n * image + p * pixel, its channels are adjacent."""

    data: Tensor
    image: int
    pixel: int


def tile_of(
    images: int,
    pixels: int,
    in_channels: int,
    out_channels: int,
    dtype: torch.dtype,
    exact: bool,
    gated: bool,
    spans: bool,
    multiprocessors: int,
) -> Tile:
    """Return the tile for `images` times `pixels` rows on a GPU with so many multiprocessors.

    The largest that gives each of them a tile; small ones read x and weight more often, but from L2. The numbers
    are what compiles without a spill for sm_80 and sm_90 (tests/triton_gates), not what was measured to be fastest.

    Args:
        exact: float32 by multiply-adds, not on tensor cores.
        gated: whether a gate multiplies x, which then passes through registers.
        spans: whether a tile holds rows of several images.
    """
    # Few input channels: writing y outweighs reading x more often, and small tiles overlap the two better.
    most_columns = 32 if exact else 64 if in_channels <= 96 else 128
    if out_channels <= most_columns:
        columns = max(_launch.next_power_of_2(out_channels), 16)  # 16: the least that tl.dot takes
    elif most_columns == 128:
        columns = min((128, 64), key=lambda c: _launch.divide_up(out_channels, c) * c)
    else:
        columns = most_columns
    # 128 x 128 takes all registers, leaves one block to a multiprocessor and pays where products outweigh traffic.
    many_products = dtype.itemsize == 2 and not gated and in_channels >= 256
    rows = 64 if exact or spans or (columns == 128 and not many_products) else 128
    while rows > 32 and rows >= 2 * (images * pixels if spans else pixels):
        rows //= 2

    def tiles() -> int:
        row_tiles = _launch.divide_up(images * pixels, rows) if spans else images * _launch.divide_up(pixels, rows)
        return row_tiles * _launch.divide_up(out_channels, columns)

    while tiles() < multiprocessors and (rows > 32 or columns > 32):
        if rows >= columns and rows > 32:
            rows //= 2
        else:
            columns //= 2
    widest_step = 64 if dtype.itemsize == 2 else 16 if exact and rows == 32 else 32
    step = min(max(_launch.next_power_of_2(in_channels), 16), widest_step)
    # The fewest that spill nowhere; with short steps ptxas aims at fewer registers, and misses with 4.
    warps = 8 if rows * columns >= 8192 or (rows * columns == 4096 and step < 64) else 4
    return Tile(rows, columns, step, warps, stages=3)


def candidates(
    images: int,
    pixels: int,
    in_channels: int,
    out_channels: int,
    dtype: torch.dtype,
    exact: bool,
    gated: bool,
    spans: bool,
    multiprocessors: int,
) -> tuple[Tile, ...]:
    """Return the tiles that `effkernels tune` may choose from, the one of `tile_of` first; arguments as there.

    Every size of tile at the default's depth, then the default with other steps, warps and stages. All of them fit
    the shared memory and, exact ones, the registers of every GPU from compute capability 8.0 on.
    """
    default = tile_of(images, pixels, in_channels, out_channels, dtype, exact, gated, spans, multiprocessors)
    most_rows, most_columns = (64, 32) if exact else (64 if spans else 128, 128)
    widest_step = min(64 if dtype.itemsize == 2 else 32, max(16, _launch.next_power_of_2(in_channels)))
    found = [default]
    for rows in (32, 64, 128):
        for columns in (16, 32, 64, 128):
            if rows <= most_rows and columns <= min(most_columns, max(16, _launch.next_power_of_2(out_channels))):
                step = 16 if exact and rows == 32 else default.step
                warps = 8 if rows * columns >= 8192 or (rows * columns == 4096 and step < 64) else 4
                found.append(Tile(rows, columns, step, warps, default.stages))
    found += [default._replace(step=step) for step in (16, 32, 64) if step <= widest_step]
    found += [default._replace(warps=warps) for warps in (4, 8)]
    found += [default._replace(stages=stages) for stages in (2, 4)]
    return tuple(tile for tile in dict.fromkeys(found) if tile == default or _fits(tile, dtype))


def _fits(tile: Tile, dtype: torch.dtype) -> bool:
    return tile.stages * (tile.rows + tile.columns) * tile.step * dtype.itemsize <= MOST_SHARED


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU.

    Without one return 1, which makes every tile the largest: the interpreter's time grows with the programs.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def nearest_tf32(x):
    """Rounded to the nearest TF32. A tensor core by itself drops the bits that it does not take, and its error is then
    of one sign: 2.6 times that of rounding, which is what cuBLAS does.
    """
    bits = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _multiply(
    total,
    first,
    last,
    x_rows,
    gate_rows,
    weight_columns,
    row_inside,
    column_inside,
    in_channels,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    STEP: tl.constexpr,
):
    """Add the products of channels `first` to `last` to `total`."""
    for start in range(first, last, STEP):
        k = start + tl.arange(0, STEP)
        inside = k < in_channels
        x = tl.load(x_rows + k[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        if GATED:
            gate = tl.load(gate_rows + k[None, :], mask=inside[None, :], other=0.0)
            # Rounded twice, the gate and the product, as PyTorch's x * gate.to(x.dtype) is.
            x = (x.to(tl.float32) * gate.to(DTYPE).to(tl.float32)).to(DTYPE)
        weight = tl.load(weight_columns + k[:, None], mask=inside[:, None] & column_inside[None, :], other=0.0)
        weight = weight.to(DTYPE)
        if ROUNDED:
            x = nearest_tf32(x)
            weight = nearest_tf32(weight)
        total = tl.dot(x, weight, total, input_precision=PRECISION)
    return total


@triton.jit
def _product(
    x_rows,
    gate_rows,
    weight_columns,
    row_inside,
    column_inside,
    in_channels,
    GATED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return the products of a tile, summed over all channels, in runs of RUN of them where it is not 0."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if RUN > 0:
        for first in range(0, in_channels, RUN):
            run = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            total += _multiply(
                run,
                first,
                tl.minimum(first + RUN, in_channels),
                x_rows,
                gate_rows,
                weight_columns,
                row_inside,
                column_inside,
                in_channels,
                GATED,
                DTYPE,
                PRECISION,
                ROUNDED,
                STEP,
            )
    else:
        total = _multiply(
            total,
            0,
            in_channels,
            x_rows,
            gate_rows,
            weight_columns,
            row_inside,
            column_inside,
            in_channels,
            GATED,
            DTYPE,
            PRECISION,
            ROUNDED,
            STEP,
        )
    return total


@triton.jit(
    do_not_specialize=[
        "rows",
        "pixels",
        "row_tiles",
        "column_tiles",
        "in_vectors",
        "out_vectors",
        "x_image",
        "x_pixel",
        "residual_image",
        "residual_pixel",
    ]
)
def pointwise_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    gate_ptr,
    residual_ptr,
    y_ptr,
    eps,
    rows,
    pixels,
    row_tiles,
    column_tiles,
    in_vectors,
    out_vectors,
    x_image,
    x_pixel,
    residual_image,
    residual_pixel,
    ACTIVATION: tl.constexpr,
    SPANS: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    RESIDUAL_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute one tile of y. `row_tiles` counts those of an image, or of all rows where a tile spans images (SPANS)."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GATED: tl.constexpr = gate_ptr is not None
    in_channels = in_vectors * IN_VECTOR
    out_channels = out_vectors * OUT_VECTOR
    program = tl.program_id(0)
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < out_channels
    row_tile = program // column_tiles
    if SPANS:
        row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = row < rows
        row = tl.minimum(row, rows - 1)  # its image's gate is read, whatever the row
        image = row // pixels
        pixel = row % pixels
    else:
        image = (row_tile // row_tiles).to(tl.int64)
        pixel = (row_tile % row_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = pixel < pixels
        row = image * pixels + pixel

    x_rows = x_ptr + ((image * x_image + pixel * x_pixel) * X_VECTOR)[:, None]
    weight_columns = weight_ptr + (column.to(tl.int64) * in_channels)[None, :]
    gate_rows = gate_ptr
    if GATED:
        gate_rows = gate_ptr + ((image * in_channels)[:, None] if SPANS else image * in_channels)
    total = _product(
        x_rows,
        gate_rows,
        weight_columns,
        row_inside,
        column_inside,
        in_channels,
        GATED,
        DTYPE,
        PRECISION,
        ROUNDED,
        RUN,
        ROWS,
        COLUMNS,
        STEP,
    )

    scale, shift = _common.scale_shift(
        column, column_inside, bias_ptr, norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, eps
    )
    y = _common.activate(total * scale[None, :] + shift[None, :], ACTIVATION)
    inside = row_inside[:, None] & column_inside[None, :]
    if residual_ptr is not None:
        residual_rows = residual_ptr + ((image * residual_image + pixel * residual_pixel) * RESIDUAL_VECTOR)[:, None]
        y += tl.load(residual_rows + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + (row * out_channels)[:, None] + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "column_tiles", "in_vectors", "out_channels", "x_image", "x_pixel"])
def pointwise_pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_mean_ptr,
    norm_var_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    eps,
    pixels,
    column_tiles,
    in_vectors,
    out_channels,
    x_image,
    x_pixel,
    ACTIVATION: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    X_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute the means of one image in a tile of columns: y (images x out_channels). Rows are walked in order."""
    in_channels = in_vectors * IN_VECTOR
    program = tl.program_id(0)
    column = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_inside = column < out_channels
    image = (program // column_tiles).to(tl.int64)
    weight_columns = weight_ptr + (column.to(tl.int64) * in_channels)[None, :]
    scale, shift = _common.scale_shift(
        column, column_inside, bias_ptr, norm_mean_ptr, norm_var_ptr, norm_weight_ptr, norm_bias_ptr, eps
    )
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first_pixel in range(0, pixels, ROWS):
        pixel = first_pixel + tl.arange(0, ROWS)
        row_inside = pixel < pixels
        x_rows = x_ptr + ((image * x_image + pixel.to(tl.int64) * x_pixel) * X_VECTOR)[:, None]
        total = _product(
            x_rows,
            None,
            weight_columns,
            row_inside,
            column_inside,
            in_channels,
            False,
            x_ptr.dtype.element_ty,
            PRECISION,
            ROUNDED,
            RUN,
            ROWS,
            COLUMNS,
            STEP,
        )
        y = _common.activate(total * scale[None, :] + shift[None, :], ACTIVATION)
        # In two levels: one chain of additions over a tile would err more than PyTorch's mean.
        y = tl.reshape(tl.where(row_inside[:, None], y, 0.0), (ROWS // POOL_RUN, POOL_RUN, COLUMNS))
        sums += tl.sum(tl.sum(y, axis=1), axis=0)
    means = sums / pixels
    tl.store(y_ptr + image * out_channels + column, means.to(y_ptr.dtype.element_ty), mask=column_inside)


def pointwise_bn_act(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool,
) -> None:
    """Fill `out` (N, C_out, H, W), exact channels_last; arguments as in effkernels.ops.pointwise_bn_act, checked."""
    images, in_channels, height, width = x.shape
    out_channels, pixels = weight.shape[0], height * width
    x_rows = _rows(x)
    residual_rows = None if residual is None else _rows(residual)
    given = [x_rows] if residual_rows is None else [x_rows, residual_rows]
    if gate is None and all(r.image == pixels * r.pixel for r in given):
        images, pixels = 1, images * pixels  # one tall image: no tile ends where an image does
    spans = images > 1 and pixels < FEWEST_PIXELS_OF_OWN_TILE
    rows = images * pixels

    exact, tf32 = _exactness(x.dtype, allow_tf32)
    cut = (images, pixels, in_channels, out_channels, x.dtype, exact, gate is not None, spans)
    shape = (images, pixels, in_channels, out_channels, int(exact), int(gate is not None), int(spans))
    tile = _launch.tuned("pointwise_bn_act", x, shape, lambda: candidates(*cut, multiprocessors(x.device)))
    if tile is None:
        tile = tile_of(*cut, multiprocessors(x.device))
    row_tiles = _launch.divide_up(rows if spans else pixels, tile.rows)
    column_tiles = _launch.divide_up(out_channels, tile.columns)
    in_vector, out_vector = _vector(x.dtype, in_channels), _vector(x.dtype, out_channels)
    x_vector = _vector(x.dtype, x_rows.image, x_rows.pixel)
    residual_image, residual_pixel = (0, 0) if residual_rows is None else residual_rows[1:]
    residual_vector = _vector(x.dtype, residual_image, residual_pixel)
    _launch.run(
        pointwise_kernel,
        ((1 if spans else images) * row_tiles * column_tiles,),
        x_rows.data,
        _launch.dense(weight),
        _launch.dense(bias),
        *_launch.dense_norm(norm),
        _launch.dense(gate),
        None if residual_rows is None else residual_rows.data,
        out,
        _launch.eps_of(norm),
        rows,
        pixels,
        row_tiles,
        column_tiles,
        in_channels // in_vector,
        out_channels // out_vector,
        x_rows.image // x_vector,
        x_rows.pixel // x_vector,
        residual_image // residual_vector,
        residual_pixel // residual_vector,
        ACTIVATION=_launch.activation_for(activation, x.dtype),
        SPANS=spans,
        IN_VECTOR=in_vector,
        OUT_VECTOR=out_vector,
        X_VECTOR=x_vector,
        RESIDUAL_VECTOR=residual_vector,
        **_options(tile, in_channels, exact, tf32),
    )


def pointwise_bn_act_pool(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    activation: str,
    allow_tf32: bool,
) -> None:
    """Fill `out` (N, C_out); arguments as in effkernels.ops.pointwise_bn_act_pool, checked."""
    images, in_channels, height, width = x.shape
    out_channels, pixels = weight.shape[0], height * width
    x_rows = _rows(x)
    exact, tf32 = _exactness(x.dtype, allow_tf32)
    # A program walks over the rows of its image, so one tile of them is all that a GPU has to be filled with.
    walked = min(pixels, 64)
    tile = tile_of(images, walked, in_channels, out_channels, x.dtype, exact, False, False, multiprocessors(x.device))
    if exact:  # the sums of the image are one thing more to keep: with 4 warps sm_80 spills
        tile = tile._replace(warps=8)
    column_tiles = _launch.divide_up(out_channels, tile.columns)
    in_vector = _vector(x.dtype, in_channels)
    x_vector = _vector(x.dtype, x_rows.image, x_rows.pixel)
    _launch.run(
        pointwise_pool_kernel,
        (images * column_tiles,),
        x_rows.data,
        _launch.dense(weight),
        _launch.dense(bias),
        *_launch.dense_norm(norm),
        out,
        _launch.eps_of(norm),
        pixels,
        column_tiles,
        in_channels // in_vector,
        out_channels,
        x_rows.image // x_vector,
        x_rows.pixel // x_vector,
        ACTIVATION=_launch.activation_for(activation, x.dtype),
        IN_VECTOR=in_vector,
        X_VECTOR=x_vector,
        **_options(tile, in_channels, exact, tf32),
    )


OPERATORS = {"pointwise_bn_act": pointwise_bn_act, "pointwise_bn_act_pool": pointwise_bn_act_pool}


def _exactness(dtype: torch.dtype, allow_tf32: bool) -> tuple[bool, bool]:
    """Return whether a product is by exact multiply-adds, and whether it is in TF32."""
    return dtype == torch.float32 and not allow_tf32, dtype == torch.float32 and allow_tf32


def _options(tile: Tile, in_channels: int, exact: bool, tf32: bool) -> dict[str, Any]:
    """Return what a product's tile and exactness decide for the compiler."""
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROUNDED": tf32 and not _launch.INTERPRETED and torch.version.hip is None,
        "RUN": EXACT_RUN if exact and in_channels > EXACT_RUN else 0,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "STEP": tile.step,
        "num_warps": tile.warps,
        # 64 KB of shared memory on AMD's GPUs, whose compiler keeps one stage in registers
        "num_stages": tile.stages if torch.version.hip is None else 2,
    }


def _rows(t: Tensor) -> Rows:
    """Return `t` as a matrix; a copy where its channels, or its rows of pixels, do not follow each other."""
    images, _, height, width = t.shape
    t = _launch.channels_last(t)
    image, row, pixel = _launch.image_strides(t)
    if height > 1 and width > 1 and row != width * pixel:
        t = t.contiguous(memory_format=torch.channels_last)
        image, row, pixel = _launch.image_strides(t)
    pixel = pixel if width > 1 else row
    # The strides that an axis of size 1 would have if it had more: then all pixels of all images may be one matrix.
    if height * width == 1:
        pixel = image
    if images == 1:
        image = height * width * pixel
    return Rows(t, image, pixel)


def _vector(dtype: torch.dtype, *multiples: int) -> int:
    """Return the largest number of elements within 16 bytes that divides all of `multiples`."""
    return math.gcd(16 // dtype.itemsize, *multiples)

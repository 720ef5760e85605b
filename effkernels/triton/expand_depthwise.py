"""`expand_depthwise_squeeze` in Triton: both convolutions in one pass, the tensor between them in registers.

Lanes. The output plane is cut into lanes, strips of STRIP neighbouring columns and `tall` rows. A program takes LANES
of them by BLOCK expanded channels of one image. It slides down the input rows of its lanes, and of each row takes the
pixels that a strip reads, one of every lane together: the expand product of these, (BLOCK, C_in) by (C_in, LANES),
gives one expanded pixel of every lane as a tile of its own, which is normed, activated, set to zero outside the image,
rounded as it would be in memory, and added to all the outputs that it reaches. So the K*K shifts of the depthwise
convolution choose among tiles and move nothing; Triton cannot index shared memory, and need not. The output rows that
wait for more input (`sums`) move up by one after each row, which is a matter of names.

The products of COLUMNS pixels are one `tl.dot`, taken apart after it by `tl.split`. That costs nothing where the
columns are in registers, and `cut_of` sees to it: the compiled loop converts no layout but that of y for its 16-byte
stores. Neighbouring lanes share K - stride columns and rows, whose pixels are expanded twice: for the layers of B0 that
run in one launch 1.3 to 2.6 pixels in place of one. `one_pass` decides by that; other shapes take two launches. The
sums of the squeeze are those of depthwise.py.

What lost, counted in instructions for an output element of a 3x3 in bfloat16 (no GPU was at hand), which takes 9
multiply-adds and some 15 for the two activations, norms and roundings:
- `tl.gather` of the shifted tile: each tap writes the tile to shared memory and reads it element by element, 18
  accesses at a quarter of the rate of a multiply-add, and two barriers to a tap.
- Products with 0/1 shift matrices on tensor cores: 128 multiply-adds to a tap, 8 times its cost without them.
- Expanding again for each column of taps: three times the activations.
- A scratch in the L2 cache: it is written to memory after all.
- One product for each pixel: its loads are too small for 16 bytes to a thread, and each waits at a barrier of its own.
- Products of 8 pixels with mma.sync: warps then share out the pixels, and half of all tiles pass through shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels._norm import Norm
from effkernels.triton import _launch, depthwise, pointwise
from effkernels.triton._common import activate, load_float, scale_shift
from effkernels.triton.depthwise import added_tiles, arrive_last
from effkernels.triton.pointwise import multiprocessors, nearest_tf32

# Input channels, by the stride, up to which a multiprocessor reads x once for each group of channels faster than it
# would write and read the expanded tensor; those of 16 bits. With stride 2 two rows of x are in shared memory, and in
# the code, at a time. An exact product takes as many multiply-adds as channels, and its factors as many registers.
_MOST_IN_CHANNELS = {1: 128, 2: 64}
_MOST_IN_CHANNELS_EXACT = 32
# Expanded pixels computed for each that the plane has, at which computing them again no longer pays.
_MOST_RECOMPUTED = 3.0
_RESIDENT = 2  # programs of a multiprocessor at once: they use all of its registers
_INTERPRETED_LANES = 32  # interpreted, time goes with the number of programs
_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}  # as in depthwise.py


@triton.jit
def taps_of(weight, c, c_inside, KERNEL: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """Load the depthwise weights of channels `c` in the kernel's rows FIRST, FIRST + STRIDE and so on."""
    taps = ()
    for ky in tl.static_range(FIRST, KERNEL, STRIDE):
        for kx in tl.static_range(KERNEL):
            at = weight + c * (KERNEL * KERNEL) + ky * KERNEL + kx
            taps = taps + (load_float(at, c_inside)[:, None],)
    return taps


@triton.jit
def halves(tile, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Split a tile: return the left and the right half of a (BLOCK, COLUMNS) tile."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def columns_apart(tile, COUNT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return a (BLOCK, COUNT * LANES) tile as COUNT tiles (BLOCK, LANES), from left to right; COUNT is 1, 2 or 4."""
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4)
    if COUNT == 1:
        tiles = (tile,)
    elif COUNT == 2:
        tiles = halves(tile, BLOCK, 2 * LANES)
    else:
        left, right = halves(tile, BLOCK, 4 * LANES)
        tiles = halves(left, BLOCK, 2 * LANES) + halves(right, BLOCK, 2 * LANES)
    return tiles


@triton.jit
def side_by_side(left, right, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Two halves as one (BLOCK, COLUMNS) tile."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (BLOCK, COLUMNS))


@triton.jit
def columns_together(tiles, COUNT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return the products that `columns_apart` takes apart."""
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4)
    if COUNT == 1:
        tile = tiles[0]
    elif COUNT == 2:
        tile = side_by_side(tiles[0], tiles[1], BLOCK, 2 * LANES)
    else:
        left = side_by_side(tiles[0], tiles[1], BLOCK, 2 * LANES)
        tile = side_by_side(left, side_by_side(tiles[2], tiles[3], BLOCK, 2 * LANES), BLOCK, 4 * LANES)
    return tile


@triton.jit(
    do_not_specialize=[
        "in_vectors",
        "channel_vectors",
        "height",
        "width",
        "out_height",
        "out_width",
        "stride_n_vectors",
        "stride_h_vectors",
        "stride_w_vectors",
        "pad_top",
        "pad_left",
        "strips",
        "tall",
        "groups",
        "tiles",
    ]
)
def expand_depthwise_kernel(
    y,
    x,
    expand_weight,
    expand_bias,
    expand_norm_mean,
    expand_norm_var,
    expand_norm_weight,
    expand_norm_bias,
    expand_eps,
    weight,
    bias,
    norm_mean,
    norm_var,
    norm_weight,
    norm_bias,
    eps,
    partial,
    arrivals,
    pooled,
    in_vectors,
    channel_vectors,
    height,
    width,
    out_height,
    out_width,
    stride_n_vectors,
    stride_h_vectors,
    stride_w_vectors,
    pad_top,
    pad_left,
    strips,
    tall,
    groups,
    tiles,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS_HELD: tl.constexpr,
    STEPS: tl.constexpr,
    STEP: tl.constexpr,
    IN_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    EXPAND_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    group = program % groups
    tile = program // groups % tiles
    image = (program // groups // tiles).to(tl.int64)

    in_channels = in_vectors * IN_VECTOR
    channels = channel_vectors * OUT_VECTOR
    c = group * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    lane = tile * LANES + tl.arange(0, LANES)
    column = lane % strips * STRIP
    row = lane // strips * tall
    lane_inside = row < out_height
    top = row * STRIDE - pad_top
    left = column * STRIDE - pad_left
    # The same of the pixels that are loaded together: COLUMNS input columns of every lane, column by column.
    loaded = tl.arange(0, COLUMNS * LANES)
    lane_loaded = tile * LANES + loaded % LANES
    row_loaded = lane_loaded // strips * tall
    top_loaded = row_loaded * STRIDE - pad_top
    left_loaded = lane_loaded % strips * (STRIP * STRIDE) - pad_left + loaded // LANES

    # And of those that are stored together.
    stored = tl.arange(0, STRIP * LANES)
    lane_stored = tile * LANES + stored % LANES
    row_stored = lane_stored // strips * tall
    column_stored = lane_stored % strips * STRIP + stored // LANES

    weights = ()
    for step in tl.static_range(STEPS):
        k = step * STEP + tl.arange(0, STEP)
        at = expand_weight + c[:, None].to(tl.int64) * in_channels + k[None, :]
        w = tl.load(at, mask=c_inside[:, None] & (k < in_channels)[None, :], other=0.0).to(DTYPE)
        if ROUNDED:
            w = nearest_tf32(w)
        weights = weights + (w,)
    expand_scale, expand_shift = scale_shift(
        c, c_inside, expand_bias, expand_norm_mean, expand_norm_var, expand_norm_weight, expand_norm_bias, expand_eps
    )
    if TAPS_HELD:
        held = ()  # the taps that each of STRIDE successive input rows meets
        for s in tl.static_range(STRIDE):
            held = held + (taps_of(weight, c, c_inside, KERNEL, s, STRIDE),)
    scale, shift = scale_shift(c, c_inside, bias, norm_mean, norm_var, norm_weight, norm_bias, eps)

    INPUTS: tl.constexpr = (STRIP - 1) * STRIDE + KERNEL
    PENDING: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    image_x = x + image * stride_n_vectors * IN_VECTOR
    pixels = out_height * out_width
    image_y = y + image * pixels * channels
    pooled_sum = tl.zeros((BLOCK, LANES), dtype=tl.float32)
    sums = ()
    for _ in tl.static_range(PENDING * STRIP):
        sums = sums + (tl.zeros((BLOCK, LANES), dtype=tl.float32),)
    for t in range(tall + PENDING - 1):
        for s in tl.static_range(STRIDE):
            # With stride 2 an input row meets every second row of taps; all 25 at once cost bfloat16 a spill.
            if TAPS_HELD:
                taps = held[s]  # type: ignore[var-annotated]
            else:
                taps = taps_of(weight, c, c_inside, KERNEL, s, STRIDE)
            y_loaded = top_loaded + (t * STRIDE + s)
            y_loaded_inside = (row_loaded < out_height) & (y_loaded >= 0) & (y_loaded < height)
            if WIDE:
                y_loaded = y_loaded.to(tl.int64)
            rows_x = image_x + y_loaded * stride_h_vectors * IN_VECTOR
            y_in = top + (t * STRIDE + s)
            row_inside = lane_inside & (y_in >= 0) & (y_in < height)
            for first in tl.static_range(0, INPUTS, COLUMNS):
                x_loaded = left_loaded + first
                inside = y_loaded_inside & (x_loaded >= 0) & (x_loaded < width)
                if WIDE:
                    x_loaded = x_loaded.to(tl.int64)
                pixels_x = rows_x + x_loaded * stride_w_vectors * IN_VECTOR
                products = tl.zeros((BLOCK, COLUMNS * LANES), dtype=tl.float32)
                for step in tl.static_range(STEPS):
                    k = step * STEP + tl.arange(0, STEP)
                    mask = inside[:, None] & (k < in_channels)[None, :]
                    factor = tl.load(pixels_x[:, None] + k[None, :], mask=mask, other=0.0)
                    if ROUNDED:
                        factor = nearest_tf32(factor)
                    products = tl.dot(weights[step], tl.trans(factor), products, input_precision=PRECISION)
                columns = columns_apart(products, COLUMNS, BLOCK, LANES)
                for ix in tl.static_range(first, min(first + COLUMNS, INPUTS)):
                    value = columns[ix - first] * expand_scale[:, None] + expand_shift[:, None]
                    value = activate(value, EXPAND_ACTIVATION)
                    x_in = left + ix
                    value = tl.where((row_inside & (x_in >= 0) & (x_in < width))[None, :], value, 0.0)
                    value = value.to(DTYPE).to(tl.float32)
                    added = ()
                    for j in tl.static_range(PENDING):
                        for ox in tl.static_range(STRIP):
                            if j * STRIDE + s < KERNEL and ix - ox * STRIDE >= 0 and ix - ox * STRIDE < KERNEL:
                                tap_weight = taps[j * KERNEL + ix - ox * STRIDE]  # type: ignore[var-annotated]
                                added = added + (sums[j * STRIP + ox] + value * tap_weight,)
                            else:
                                added = added + (sums[j * STRIP + ox],)
                    sums = added
        done = t - (PENDING - 1)
        row_done = row + done
        lane_done = lane_inside & (done >= 0) & (row_done < out_height)
        finished = ()
        moved = ()
        for ox in tl.static_range(STRIP):
            value = activate(sums[(PENDING - 1) * STRIP + ox] * scale[:, None] + shift[:, None], ACTIVATION)
            inside = c_inside[:, None] & (lane_done & (column + ox < out_width))[None, :]
            pooled_sum += tl.where(inside, value, 0.0)
            finished = finished + (value.to(DTYPE),)
            moved = moved + (tl.zeros((BLOCK, LANES), dtype=tl.float32),)
        for older in tl.static_range((PENDING - 1) * STRIP):
            moved = moved + (sums[older],)
        sums = moved
        row_stored_done = row_stored + done
        stored_inside = (done >= 0) & (row_stored_done < out_height) & (column_stored < out_width)
        pixel = row_stored_done * out_width + column_stored
        if WIDE:
            pixel = pixel.to(tl.int64)
        tl.store(
            image_y + (pixel * channels)[None, :] + c[:, None],
            columns_together(finished, STRIP, BLOCK, LANES),
            mask=c_inside[:, None] & stored_inside[None, :],
        )

    sum_of_tile = tl.sum(pooled_sum, axis=1)
    image_means = pooled + image * channels
    if partial is None:
        tl.store(image_means + c, sum_of_tile / pixels, mask=c_inside)
    else:
        image_partial = partial + image * tiles * channels
        tl.store(image_partial + tile * channels + c, sum_of_tile, mask=c_inside)
        if arrive_last(arrivals + image * groups + group, tiles):
            means = added_tiles(image_partial, c, channels, tiles, 16, BLOCK) / pixels
            tl.store(image_means + c, means, mask=c_inside)


class Cut(NamedTuple):
    """The tile of a program's products, and the roles of its lanes.

    Attributes:
        strip: neighbouring pixels of an output row that a lane computes at a time, a power of two.
        lanes, block: lanes and expanded channels of a program.
        columns: input pixels of a lane that one matrix product takes, a power of two.
        taps_held: the depthwise weights stay in registers, instead of coming from L1 for every row.
        step: input channels that one matrix product takes.
        stages: rows of input pixels in shared memory at a time.
    """

    strip: int
    lanes: int
    block: int
    columns: int
    taps_held: bool
    step: int
    stages: int


class Sweep(NamedTuple):
    """The division of an output plane: `strips` next to each other in a row, `tall` rows to a lane, `tiles` programs
    along the plane, and what it comes to: expanded rows that are computed one after another, over all rounds of
    programs.
    """

    strips: int
    tall: int
    tiles: int
    rows: float


def cut_of(kernel: int, stride: int, dtype: torch.dtype, exact: bool, aligned: bool, capability: int) -> Cut:
    """Return the cut for a GPU of compute capability `capability`.x, 0 for AMD's; the largest that spills no register.

    With wgmma (capability 9) the four warps share out the channels whatever the tile. With mma.sync they do so only
    where it is no wider than 16 pixels; a wider one would have to pass from warp to warp through shared memory.
    """
    size = dtype.itemsize
    if capability == 9:
        strip = 2 if exact or (size == 4 and stride == 2) else 4
        return Cut(strip, 8, 64, columns=4, taps_held=kernel == 3, step=64 // size, stages=3)
    strip = 2 if size == 4 or not aligned or (kernel == 5 and stride == 2) else 4
    if capability == 0:
        return Cut(strip, 16, 64, columns=2, taps_held=kernel == 3, step=64 // size, stages=2)
    return Cut(strip, 8, 64, columns=2, taps_held=kernel == 3, step=128 // size, stages=2)


def inputs_of(strip: int, kernel: int, stride: int) -> int:
    """Return the pixels of an input row that a strip reads."""
    return (strip - 1) * stride + kernel


def pending_of(kernel: int, stride: int) -> int:
    """Output rows that a sweep has begun and not finished."""
    return _launch.divide_up(kernel, stride)


@cache
def sweep_of(cut: Cut, programs: int, out_height: int, out_width: int, kernel: int, stride: int, slots: int) -> Sweep:
    """Return the fastest sweep if `programs` share each tile of the plane (images times groups of channels) and `slots`
    programs run at once. A lane of few rows computes more of them twice; lanes of many may be too few for the GPU.
    """
    strips = _launch.divide_up(out_width, cut.strip)

    def sweep(chunks: int) -> Sweep:
        tall = _launch.divide_up(out_height, chunks)
        tiles = _launch.divide_up(strips * _launch.divide_up(out_height, tall), cut.lanes)
        rounds = max(1.0, programs * tiles / slots)
        return Sweep(strips, tall, tiles, rounds * (tall + pending_of(kernel, stride) - 1) * stride)

    return min((sweep(chunks) for chunks in range(1, out_height + 1)), key=lambda found: found.rows)


@cache
def one_pass(
    in_channels: int,
    height: int,
    width: int,
    out_height: int,
    out_width: int,
    kernel: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    exact: bool,
    aligned: bool,
    capability: int,
) -> bool:
    """Return whether the expanded tensor stays on the chip; else it is written, and a second launch reads it.

    `kernel` is the size of a square kernel, 0 of any other.

    It does for 3x3 and 5x5 without dilation (neighbours share no input with it; larger kernels leave no registers), for
    input channels up to a limit, and for planes that do not leave most of the lanes' work to halos and idle lanes. If
    pixels are no whole 16-byte vectors, every element takes an address and a mask of its own: 5x5 and stride 2 spilled,
    even with strips of 2 (8 to 248 bytes on sm_80 and sm_90, Triton 3.7.1 and 3.8.0).
    """
    most = _MOST_IN_CHANNELS_EXACT if exact else _MOST_IN_CHANNELS[stride] * 2 // dtype.itemsize
    if kernel not in (3, 5) or dilation > 1 or in_channels > most:
        return False
    if (exact or not aligned) and (kernel > 3 or stride > 1):
        return False
    cut = cut_of(kernel, stride, dtype, exact, aligned, capability)
    sweep = sweep_of(cut, 1, out_height, out_width, kernel, stride, 1)
    computed = sweep.rows * cut.lanes * inputs_of(cut.strip, kernel, stride)
    return computed <= _MOST_RECOMPUTED * height * width


def capability_of(device: torch.device) -> int:
    """Return the first number of a GPU's compute capability, 0 of AMD's; where there is no GPU, 9."""
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def expand_depthwise_squeeze(
    out: tuple[Tensor, Tensor],
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    expand_norm: Norm | None,
    expand_activation: str,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    activation: str,
    allow_tf32: bool,
) -> None:
    """Fill y (N, C, H', W'), exact channels_last, and pooled (N, C); arguments as in
    effkernels.ops.expand_depthwise_squeeze, checked. One launch where `one_pass` says so, else two.
    """
    y, pooled = out
    x = _launch.channels_last(x)
    batch, in_channels, height, width = x.shape
    _, channels, out_height, out_width = y.shape
    kernel = weight.shape[2] if weight.shape[2] == weight.shape[3] else 0  # of a square one
    exact = x.dtype == torch.float32 and not allow_tf32
    tf32 = x.dtype == torch.float32 and allow_tf32
    in_vector = _launch.vector_of(x.dtype) if _launch.vectors_fit(in_channels, x) else 1
    out_vector = _launch.vector_of(y.dtype) if _launch.vectors_fit(channels, y) else 1
    aligned = in_vector > 1 and out_vector > 1
    capability = capability_of(x.device)
    sizes = (height, width, out_height, out_width, kernel, stride, dilation)
    if not one_pass(in_channels, *sizes, x.dtype, exact, aligned, capability):
        expanded = torch.empty(
            (batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        expand = (expand_weight, expand_bias, expand_norm, None, None, expand_activation, allow_tf32)
        pointwise.pointwise_bn_act(expanded, x, *expand)
        conv = (weight, bias, norm, stride, padding, dilation, activation)
        depthwise.depthwise_bn_act_squeeze(out, expanded, *conv)
        return

    cut = cut_of(kernel, stride, x.dtype, exact, aligned, capability)
    if _launch.INTERPRETED:
        cut = cut._replace(lanes=_INTERPRETED_LANES)
    groups = _launch.divide_up(channels, cut.block)
    slots = _RESIDENT * multiprocessors(x.device)
    sweep = sweep_of(cut, batch * groups, out_height, out_width, kernel, stride, slots)
    partial, arrivals = None, None
    if sweep.tiles > 1:
        partial = torch.empty((batch, sweep.tiles, channels), dtype=torch.float32, device=x.device)
        arrivals = _launch.counters(x.device, batch * groups)
    _launch.run(
        expand_depthwise_kernel,
        (batch * sweep.tiles * groups,),
        y,
        x,
        *map(_launch.dense, (expand_weight, expand_bias)),
        *_launch.dense_norm(expand_norm),
        _launch.eps_of(expand_norm),
        *map(_launch.dense, (weight, bias)),
        *_launch.dense_norm(norm),
        _launch.eps_of(norm),
        partial,
        arrivals,
        pooled,
        in_channels // in_vector,
        channels // out_vector,
        height,
        width,
        out_height,
        out_width,
        *(s // in_vector for s in _launch.image_strides(x)),
        padding[0],
        padding[2],
        sweep.strips,
        sweep.tall,
        groups,
        sweep.tiles,
        KERNEL=kernel,
        STRIDE=stride,
        STRIP=cut.strip,
        LANES=cut.lanes,
        BLOCK=cut.block,
        COLUMNS=cut.columns,
        TAPS_HELD=cut.taps_held,
        STEPS=_launch.divide_up(in_channels, cut.step),
        STEP=cut.step,
        IN_VECTOR=in_vector,
        OUT_VECTOR=out_vector,
        WIDE=_launch.is_wide(x, y),
        EXPAND_ACTIVATION=_launch.activation_for(expand_activation, x.dtype),
        ACTIVATION=_launch.activation_for(activation, x.dtype),
        PRECISION="tf32" if tf32 else "ieee",
        ROUNDED=tf32 and not _launch.INTERPRETED and torch.version.hip is None,
        num_warps=4,
        num_stages=cut.stages,
        **_REGISTERS,
    )


OPERATORS = {"expand_depthwise_squeeze": expand_depthwise_squeeze}

"""Depthwise convolution, norm and activation in one pass, with channel means and squeeze-and-excitation on the way.

Programs and data. The output plane is cut into strips, STRIP neighbouring pixels of one row. A program takes LANES
strips below each other by BLOCK channels of one image, a tile (LANES, BLOCK) for each pixel of the strip. It slides
over the input rows of its strips and adds each input tile to every output tile that it reaches, so that an input is
loaded once a kernel row for a whole strip; the rows that neighbouring lanes share come from the L1 cache. Channels lie
along the threads: 16 bytes each.

Sums. A program adds the pixels of its strips in order, its lanes by a tree of fixed shape, and writes the sums down.
The program that comes last of its image (of its channel group, where only means are wanted) adds those of all programs
in their order: the same bits every time, in one launch, and nobody waits, which an interpreter that runs programs one
after another could not bear and a GPU does not promise to resolve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.triton import MOST_SCALED_ALONE, _launch, squeeze_excite
from effkernels.triton._common import activate, load_float, scale_shift
from effkernels.triton.squeeze_excite import gate_of, hidden_of

_WIDEST_BLOCK = 64  # channels of a program: 128 bytes of a pixel in 16 bits, a cache line
_THREADS = 128 if not _launch.INTERPRETED else 512  # interpreted, time goes with the number of programs
# Left to itself the assembler spills a few registers to reach the next step of occupancy. ROCm has no such limit.
_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}

# What a launch makes beside y.
_MEANS, _GATE, _GATED = "means", "gate", "gated"


@triton.jit
def arrive_last(counter, expected):
    """Return whether this program is the last of `expected` to arrive at `counter`, which is zero again then.

    What the others wrote before is there for it to read past its own first-level cache (".cg").
    """
    tl.debug_barrier()  # the stores of every thread come before the arrival of the one that counts
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def added_tiles(partial, c, channels, tiles, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Add partial[0 : tiles, c], TILES rows at a time, together with what the additions round off, so that the sum's
    error does not grow with the number of tiles.
    """
    total = tl.zeros((TILES, BLOCK), dtype=tl.float32)
    rest = tl.zeros((TILES, BLOCK), dtype=tl.float32)
    for first in range(0, tiles, TILES):
        t = first + tl.arange(0, TILES)
        inside = (t < tiles)[:, None] & (c < channels)[None, :]
        at = partial + (t[:, None].to(tl.int64) * channels + c[None, :])
        value = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        larger = total + value
        added = larger - total
        rest += (total - (larger - added)) + (value - added)
        total = larger
    return tl.sum(total + tl.where(rest == rest, rest, 0.0), axis=0)  # NaN where a value was infinite


@triton.jit
def scale_image(y, gate, pixels, channels, PIXELS: tl.constexpr, BLOCK: tl.constexpr):
    """y *= gate for one dense image that other programs wrote."""
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        factor = load_float(gate + c, c < channels)
        for first_pixel in range(0, pixels, PIXELS):
            p = first_pixel + tl.arange(0, PIXELS)
            inside = (p < pixels)[:, None] & (c < channels)[None, :]
            at = y + p[:, None] * channels + c[None, :]
            value = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32) * factor[None, :]
            tl.store(at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
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
        "dilation",
        "groups",
        "tiles",
        "reduced",
    ]
)
def depthwise_kernel(
    y,
    x,
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
    w_reduce,
    b_reduce,
    w_expand,
    b_expand,
    hidden,
    gate,
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
    dilation,
    groups,
    tiles,
    reduced,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESULT: tl.constexpr,
    SE_ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % groups
    tile = program // groups % tiles
    image = (program // groups // tiles).to(tl.int64)

    # Sizes come in vectors of 16 bytes, so that the compiler sees that a vector is read or masked as a whole.
    channels = channel_vectors * VECTOR
    c = group * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    strip = tile * LANES + tl.arange(0, LANES)
    row = strip % out_height
    column = strip // out_height * STRIP
    lane_inside = column < out_width
    top = row * STRIDE - pad_top
    left = column * STRIDE - pad_left
    image_x = x + image * stride_n_vectors * VECTOR + c[None, :]

    # From here on all loops but the one over kernel rows are unrolled, and `sums` has a tile for each pixel of a strip.
    INPUTS: tl.constexpr = (STRIP - 1) * STRIDE + KERNEL_WIDTH
    sums = ()
    for _ in tl.static_range(STRIP):
        sums = sums + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
    for ky in range(KERNEL_HEIGHT):
        y_in = top + ky * dilation
        row_inside = lane_inside & (y_in >= 0) & (y_in < height)
        if WIDE:
            y_in = y_in.to(tl.int64)
        row_x = image_x + (y_in * stride_h_vectors * VECTOR)[:, None]
        taps = ()
        for kx in tl.static_range(KERNEL_WIDTH):
            at = weight + c * (KERNEL_HEIGHT * KERNEL_WIDTH) + ky * KERNEL_WIDTH + kx
            taps = taps + (load_float(at, c_inside)[None, :],)
        for ix in tl.static_range(INPUTS):
            if STRIP == 1:
                x_in = left + ix * dilation
            else:
                x_in = left + ix
            inside = row_inside & (x_in >= 0) & (x_in < width)
            if WIDE:
                x_in = x_in.to(tl.int64)
            at = row_x + (x_in * stride_w_vectors * VECTOR)[:, None]
            value = load_float(at, inside[:, None] & c_inside[None, :])
            added = ()
            for ox in tl.static_range(STRIP):
                if ix - ox * STRIDE >= 0 and ix - ox * STRIDE < KERNEL_WIDTH:
                    added = added + (sums[ox] + value * taps[ix - ox * STRIDE],)
                else:
                    added = added + (sums[ox],)
            sums = added

    scale, shift = scale_shift(c, c_inside, bias, norm_mean, norm_var, norm_weight, norm_bias, eps)
    pixels = out_height * out_width
    image_y = y + image * pixels * channels
    total = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    for ox in tl.static_range(STRIP):
        value = activate(sums[ox] * scale[None, :] + shift[None, :], ACTIVATION)
        inside = (lane_inside & (column + ox < out_width))[:, None] & c_inside[None, :]
        pixel = row * out_width + column + ox
        if WIDE:
            pixel = pixel.to(tl.int64)
        tl.store(image_y + (pixel * channels)[:, None] + c[None, :], value.to(y.dtype.element_ty), mask=inside)
        if RESULT is not None:
            total += tl.where(inside, value, 0.0)

    if RESULT is not None:
        image_means = pooled + image * channels
        sum_of_tile = tl.sum(total, axis=0)
        if partial is None:  # one tile is the whole plane
            tl.store(image_means + c, sum_of_tile / pixels, mask=c_inside)
        else:
            image_partial = partial + image * tiles * channels
            tl.store(image_partial + tile * channels + c, sum_of_tile, mask=c_inside)
            if RESULT == "means":
                if arrive_last(arrivals + image * groups + group, tiles):
                    means = added_tiles(image_partial, c, channels, tiles, 16, BLOCK) / pixels
                    tl.store(image_means + c, means, mask=c_inside)
            elif arrive_last(arrivals + image, tiles * groups):
                for first in range(0, channels, BLOCK):
                    of = first + tl.arange(0, BLOCK)
                    means = added_tiles(image_partial, of, channels, tiles, 16, BLOCK) / pixels
                    tl.store(image_means + of, means, mask=of < channels)
                tl.debug_barrier()  # the means of every thread are there
                own = hidden + image * reduced
                hidden_of(own, image_means, w_reduce, b_reduce, channels, reduced, SE_ACTIVATION, ROWS, BLOCK)
                image_gate = gate + image * channels
                gate_of(image_gate, own, w_expand, b_expand, 0, channels, reduced, GATE, ROWS, BLOCK)
                if RESULT == "gated":
                    tl.debug_barrier()  # the gate, too
                    scale_image(image_y, image_gate, pixels, channels, LANES, BLOCK)


@dataclass(frozen=True)
class DepthwisePlan:
    """The division of one launch's work: a pure function of shapes, types and alignment.

    Attributes:
        vector: channels of a 16-byte access, 1 where they do not divide.
        strip: neighbouring pixels of a row that share their inputs.
        lanes, block: strips and channels of a program.
        groups, tiles: programs along the channels and along the plane of an image.
        wide: offsets inside an image need 64 bits.
        warps: of a program.
    """

    vector: int
    strip: int
    lanes: int
    block: int
    groups: int
    tiles: int
    wide: bool
    warps: int


class Cut(NamedTuple):
    """The fields of a `DepthwisePlan` that `effkernels tune` may choose."""

    strip: int
    lanes: int
    block: int
    warps: int


def strip_of(kernel_width: int, stride: int, dilation: int, vector: int) -> int:
    """Return the pixels of a strip: a thread has some 150 registers for their sums and the inputs of a row."""
    if dilation > 1:
        return 1  # neighbours share no input
    return 4 if vector < 8 or (stride == 1 and kernel_width <= 5) else 2


def cut_of(
    channels: int,
    out_height: int,
    out_width: int,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    dilation: int,
    vector: int,
) -> Cut:
    """Return the plan of a launch for which nothing was tuned."""
    block = min(_WIDEST_BLOCK, _launch.next_power_of_2(channels))
    if block == _WIDEST_BLOCK and -channels % block >= block // 2:
        block //= 2  # half of the last group would have nothing to do
    return _cut(strip_of(kernel_width, stride, dilation, vector), block, _THREADS, out_height, out_width, vector)


def candidates(
    channels: int,
    out_height: int,
    out_width: int,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    dilation: int,
    vector: int,
) -> tuple[Cut, ...]:
    """Return the cuts that `effkernels tune` may choose from, the one of `cut_of` first."""
    default = cut_of(channels, out_height, out_width, kernel_height, kernel_width, stride, dilation, vector)
    widest = _launch.next_power_of_2(channels)
    found = [default]
    # Of wider kernels the inputs of 7 pixels, 13 and more of them, leave no registers.
    for strip in (1,) if dilation > 1 else (2, 4, 7) if kernel_width <= 5 else (2, 4):
        for threads in (64, 128, 256):
            found.append(_cut(strip, default.block, threads, out_height, out_width, vector))
    for block in (16, 32, 64, 128):
        if vector <= block <= widest:
            found.append(_cut(default.strip, block, _THREADS, out_height, out_width, vector))
    return tuple(dict.fromkeys(found))


def _cut(strip: int, block: int, threads: int, out_height: int, out_width: int, vector: int) -> Cut:
    strips = out_height * _launch.divide_up(out_width, strip)
    lanes = min(max(1, threads * vector // block), 64, _launch.next_power_of_2(strips))
    return Cut(strip, lanes, block, max(1, min(threads, lanes * block // vector) // 32))


def plan(
    x: Tensor, y: Tensor, kernel: tuple[int, int], stride: int, dilation: int, op: str | None = None
) -> DepthwisePlan:
    """Return the plan for an x with adjacent channels; with the name of an operator, the plan tuned for it."""
    images, channels, out_height, out_width = y.shape
    vector = _launch.vector_of(x.dtype) if _launch.vectors_fit(channels, x, y) else 1
    shape = (channels, out_height, out_width, *kernel, stride, dilation, vector)
    cut = None if op is None else _launch.tuned(op, x, (images, *shape), lambda: candidates(*shape))
    if cut is None:
        cut = cut_of(*shape)
    return DepthwisePlan(
        vector,
        cut.strip,
        cut.lanes,
        cut.block,
        _launch.divide_up(channels, cut.block),
        _launch.divide_up(out_height * _launch.divide_up(out_width, cut.strip), cut.lanes),
        _launch.is_wide(x, y),
        cut.warps,
    )


def _run(
    op: str,
    y: Tensor,
    conv: Sequence[Any],
    *,
    pooled: Tensor | None = None,
    excite: Sequence[Any] | None = None,
    gate: Tensor | None = None,
    gated: bool = False,
) -> None:
    x, weight, bias, norm, stride, padding, dilation, activation = conv
    x = _launch.channels_last(x)
    batch, channels, out_height, out_width = y.shape
    p = plan(x, y, (weight.shape[2], weight.shape[3]), stride, dilation, op)
    result, partial, arrivals, hidden = None, None, None, None
    w_reduce = b_reduce = w_expand = b_expand = None
    reduced, se_activation, gate_activation = 0, "identity", "sigmoid"
    if pooled is not None or excite is not None:
        result = _MEANS
        if excite is not None or p.tiles > 1:
            partial = torch.empty((batch, p.tiles, channels), dtype=torch.float32, device=x.device)
            arrivals = _launch.counters(x.device, batch * p.groups)
    if excite is not None:
        result = _GATED if gated else _GATE
        w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation = excite
        reduced = w_reduce.shape[0]
        pooled = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
        hidden = torch.empty((batch, reduced), dtype=torch.float32, device=x.device)
    _launch.run(
        depthwise_kernel,
        (batch * p.tiles * p.groups,),
        y,
        x,
        *map(_launch.dense, (weight, bias)),
        *_launch.dense_norm(norm),
        _launch.eps_of(norm),
        partial,
        arrivals,
        pooled,
        *map(_launch.dense, (w_reduce, b_reduce, w_expand, b_expand)),
        hidden,
        gate,
        channels // p.vector,
        *x.shape[2:],
        out_height,
        out_width,
        *(s // p.vector for s in _launch.image_strides(x)),
        padding[0],
        padding[2],
        dilation,
        p.groups,
        p.tiles,
        reduced,
        KERNEL_HEIGHT=weight.shape[2],
        KERNEL_WIDTH=weight.shape[3],
        STRIDE=stride,
        STRIP=p.strip,
        LANES=p.lanes,
        BLOCK=p.block,
        VECTOR=p.vector,
        WIDE=p.wide,
        ACTIVATION=_launch.activation_for(activation, y.dtype),
        RESULT=result,
        SE_ACTIVATION=se_activation,
        GATE=gate_activation,
        ROWS=squeeze_excite.BLOCK_REDUCED,
        num_warps=p.warps,
        **_REGISTERS,
    )


def depthwise_bn_act(out: Tensor, *conv: Any) -> None:
    _run("depthwise_bn_act", out, conv)


def depthwise_bn_act_squeeze(out: tuple[Tensor, Tensor], *conv: Any) -> None:
    y, pooled = out
    _run("depthwise_bn_act_squeeze", y, conv, pooled=pooled)


def depthwise_bn_act_gate(out: tuple[Tensor, Tensor], *args: Any) -> None:
    y, gate = out
    _run("depthwise_bn_act_gate", y, args[:-6], excite=args[-6:], gate=gate)


def depthwise_bn_act_se(out: Tensor, *args: Any) -> None:
    """Scale the result by its gate in the same launch if one program can do it fast enough, else in a second one."""
    gate = torch.empty(out.shape[:2], dtype=out.dtype, device=out.device)
    alone = out[0].numel() <= MOST_SCALED_ALONE
    _run("depthwise_bn_act_se", out, args[:-6], excite=args[-6:], gate=gate, gated=alone)
    if not alone:
        squeeze_excite.scale_(out, gate)


OPERATORS = {
    "depthwise_bn_act": depthwise_bn_act,
    "depthwise_bn_act_squeeze": depthwise_bn_act_squeeze,
    "depthwise_bn_act_gate": depthwise_bn_act_gate,
    "depthwise_bn_act_se": depthwise_bn_act_se,
}

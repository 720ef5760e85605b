"""The depthwise convolution of a training step in Triton, forward and backward.

Programs and data. A lane computes STRIP neighbouring pixels of a row and walks down the rows of a band; a program has
LANES lanes, of any images, bands and strips, by BLOCK channels, which lie along the threads. Every input row is loaded
once, and norm and activation are applied to each of its elements once (and again to those that strips beside each other
share). It is added to all rows of results that it reaches, which wait in registers: KERNEL_HEIGHT of them, or half as
many with stride 2. The same kernel convolves backward: there the image is the gradient of the result, with STRIDE - 1
rows and columns of zeros between its own, which are stepped over, and the taps are in reverse.

Sums. A lane has the moments of its results, or the sums of its gradients, in float32, over the few rows of a band;
lanes are joined in float64, and programs by a second launch, in their order. The gradient of the weight is summed by a
kernel of its own that walks in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.triton import _launch, training
from effkernels.triton._common import activate_with_slope, load_float
from effkernels.triton.training import add_kept, join_moments, store_moments, sum_of_lanes

_THREADS = 128 if not _launch.INTERPRETED else 4096
_BAND = 14  # rows of results of a lane, about
_MOST_TAP_SUMS = 112  # of a thread: of the gradient of the weight


@triton.jit
def placed(program, images, bands, strips, band, rows, STRIP: tl.constexpr, LANES: tl.constexpr):
    """Return image, first row and first column of each lane, and whether it has any."""
    lane = program * LANES + tl.arange(0, LANES)
    column = lane % strips * STRIP
    above = lane // strips
    row = above % bands * band
    image = above // bands
    return image.to(tl.int64), row, column, (image < images) & (row < rows)


@triton.jit(
    do_not_specialize=[
        "images", "channel_vectors", "height", "width", "out_height", "out_width", "pad_top", "pad_left", "groups",
        "programs", "bands", "strips", "band", "steps",
    ]
)  # fmt: skip
def convolve_kernel(
    y, x, t, mean, inverse_deviation, scale, bias, taps, conv_bias, partial, images, channel_vectors, height, width,
    out_height, out_width, pad_top, pad_left, groups, programs, bands, strips, band, steps,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, STRIDE: tl.constexpr, APART: tl.constexpr,
    TOP_ODD: tl.constexpr, LEFT_ODD: tl.constexpr, STRIP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y (N, out_height, out_width, C): the convolution of x (N, height, width, C) by taps, those of `_taps`.

    Forward (t is None) x is normalised and activated, and the moments of y go to partial (3, programs, C). Backward x
    has APART - 1 zeros between its rows and columns, y is multiplied by the slope of the activation at norm(t), and the
    sums of y and of y * h, with h = (t - mean) * inverse_deviation, go to partial (2, programs, C).

    Args:
        pad_top, pad_left: rows and columns of zeros before those of x.
        TOP_ODD, LEFT_ODD: whether these are odd, where APART is 2.
        steps: of `band` rows: each takes STRIDE or APART rows of x, with the zeros among them.
    """
    program = tl.program_id(0) // groups
    channels = channel_vectors * VECTOR
    c = tl.program_id(0) % groups * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    image, row, column, lane_inside = placed(program, images, bands, strips, band, out_height, STRIP, LANES)
    top = row * STRIDE - pad_top
    left = column * STRIDE - pad_left
    group_taps = taps + tl.program_id(0) % groups * (KERNEL_HEIGHT * KERNEL_WIDTH * BLOCK) + tl.arange(0, BLOCK)
    image_x = x + (image * height * width * channels)[:, None] + c[None, :]
    image_at = (image * out_height * out_width * channels)[:, None] + c[None, :]
    HAS_NORM: tl.constexpr = mean is not None
    if HAS_NORM:
        of_mean, of_scale = load_float(mean + c, c_inside)[None, :], load_float(scale + c, c_inside)[None, :]
        of_bias = load_float(bias + c, c_inside)[None, :]
        of_deviation = load_float(inverse_deviation + c, c_inside)[None, :]

    INPUTS: tl.constexpr = (STRIP - 1) * STRIDE + KERNEL_WIDTH
    # Rows of results that wait, the oldest first, and how many of them a step finishes.
    PENDING: tl.constexpr = (KERNEL_HEIGHT - 1) // STRIDE + 1 if APART == 1 else max(KERNEL_HEIGHT, APART)
    LAST: tl.constexpr = PENDING - 1 if APART == 1 else KERNEL_HEIGHT - 1
    waiting = ()
    for _new in tl.static_range(PENDING * STRIP):
        waiting = waiting + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
    count = tl.zeros((LANES, 1), dtype=tl.float32)
    pivot = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    first = tl.zeros((LANES, BLOCK), dtype=tl.float32)  # forward the mean, backward the sum of y
    first_rest = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    second = tl.zeros((LANES, BLOCK), dtype=tl.float32)  # the squared distances, or the sum of y * h
    second_rest = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    for step in range(steps):
        for s in tl.static_range(STRIDE if APART == 1 else 1):
            # The row of x that this step begins with or, of those apart, the one of them that is not of zeros.
            if APART == 1:
                y_in = top + step * STRIDE + s
            else:
                y_in = (top + step * APART + TOP_ODD) // APART
            row_inside = lane_inside & (y_in >= 0) & (y_in < height)
            if WIDE:
                y_in = y_in.to(tl.int64)
            row_x = image_x + (y_in * width * channels)[:, None]
            for ix in tl.static_range(INPUTS):
                if APART == 1 or (ix + LEFT_ODD) % APART == 0:
                    x_in = left + ix
                    inside = row_inside & (x_in >= 0)
                    if APART > 1:
                        x_in = x_in // APART
                    inside = (inside & (x_in < width))[:, None] & c_inside[None, :]
                    value = load_float(row_x + (x_in * channels)[:, None], inside)
                    if HAS_NORM and t is None:
                        value, _slope = activate_with_slope((value - of_mean) * of_scale + of_bias, ACTIVATION)
                        value = tl.where(inside, value, 0.0)
                    added = ()
                    for j in tl.static_range(PENDING):
                        for ox in tl.static_range(STRIP):
                            # Of the taps, the one in row s + (LAST - j) * STRIDE and column ix - ox * STRIDE.
                            if (
                                (LAST - j) * STRIDE + s >= 0
                                and (LAST - j) * STRIDE + s < KERNEL_HEIGHT
                                and ix - ox * STRIDE >= 0
                                and ix - ox * STRIDE < KERNEL_WIDTH
                            ):
                                place = ((LAST - j) * STRIDE + s) * KERNEL_WIDTH + ix - ox * STRIDE
                                tap = tl.load(group_taps + place * BLOCK)
                                added = added + (waiting[j * STRIP + ox] + value * tap[None, :],)
                            else:
                                added = added + (waiting[j * STRIP + ox],)
                    waiting = added
        for d in tl.static_range(APART):
            if APART == 1:
                done = step - (PENDING - 1)
            else:
                done = step * APART + TOP_ODD - (KERNEL_HEIGHT - 1) + d
            row_done = row + done
            lane_done = lane_inside & (done >= 0) & (done < band) & (row_done < out_height)
            if WIDE:
                row_done = row_done.to(tl.int64)
            row_at = image_at + (row_done * out_width * channels)[:, None]
            if t is None:
                k = tl.zeros((LANES, 1), dtype=tl.float32)
                sum_k = tl.zeros((LANES, BLOCK), dtype=tl.float32)
                values = ()
                for ox in tl.static_range(STRIP):
                    inside = (lane_done & (column + ox < out_width))[:, None]
                    value = waiting[d * STRIP + ox]
                    if conv_bias is not None:
                        value += load_float(conv_bias + c, c_inside)[None, :]
                    stored = value.to(y.dtype.element_ty)
                    at = row_at + ((column + ox) * channels)[:, None]
                    tl.store(y + at, stored, mask=inside & c_inside[None, :])
                    value = stored.to(tl.float32)  # moments of what is stored
                    if ox == 0:
                        pivot = tl.where((count == 0.0) & inside, value, pivot)
                    value = tl.where(inside, value - pivot, 0.0)
                    values = values + (value,)
                    k += tl.where(inside, 1.0, 0.0)
                    sum_k += value
                mean_k = sum_k / tl.maximum(k, 1.0)
                squares_k = tl.zeros((LANES, BLOCK), dtype=tl.float32)
                for ox in tl.static_range(STRIP):
                    inside = (lane_done & (column + ox < out_width))[:, None]
                    distance = tl.where(inside, values[ox] - mean_k, 0.0)
                    squares_k += distance * distance
                count, first, second = join_moments(count, first, second, k, mean_k, squares_k)
            else:
                run = tl.zeros((LANES, BLOCK), dtype=tl.float32)
                run_h = tl.zeros((LANES, BLOCK), dtype=tl.float32)
                for ox in tl.static_range(STRIP):
                    inside = (lane_done & (column + ox < out_width))[:, None] & c_inside[None, :]
                    value = waiting[d * STRIP + ox]
                    at = row_at + ((column + ox) * channels)[:, None]
                    if HAS_NORM:
                        centred = load_float(t + at, inside) - of_mean
                        _value, slope = activate_with_slope(centred * of_scale + of_bias, ACTIVATION)
                        value = tl.where(inside, value * slope, 0.0)
                        run += value
                        run_h += value * (centred * of_deviation)
                    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
                if HAS_NORM:
                    first, first_rest = add_kept(first, first_rest, run)
                    second, second_rest = add_kept(second, second_rest, run_h)
        moved = ()
        for younger in tl.static_range(APART * STRIP, PENDING * STRIP):
            moved = moved + (waiting[younger],)
        for _new in tl.static_range(APART * STRIP):
            moved = moved + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
        waiting = moved

    if t is None:
        store_moments(partial, program, programs, c, channels, count, pivot, first, second)
    elif HAS_NORM:
        at = partial + program.to(tl.int64) * channels + c
        tl.store(at, sum_of_lanes(first, first_rest), mask=c_inside)
        at += programs.to(tl.int64) * channels
        tl.store(at, sum_of_lanes(second, second_rest), mask=c_inside)


@triton.jit(
    do_not_specialize=[
        "images", "channel_vectors", "height", "width", "out_height", "out_width", "pad_top", "pad_left", "groups",
        "programs", "bands", "strips", "band", "steps",
    ]
)  # fmt: skip
def weight_gradient_kernel(
    partial, dz, t, mean, scale, bias, images, channel_vectors, height, width, out_height, out_width, pad_top,
    pad_left, groups, programs, bands, strips, band, steps,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAP_ROWS: tl.constexpr, STRIDE: tl.constexpr,
    STRIP: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sum dz (N, out_height, out_width, C) times activation(norm(t)), (N, height, width, C), as each tap meets it.

    partial is (programs, KERNEL_HEIGHT * KERNEL_WIDTH, C). A program sums TAP_ROWS rows of taps, all of one row of the
    grid: what they share of t is loaded and activated once.
    """
    program = tl.program_id(0) // groups
    first_tap = tl.program_id(1) * TAP_ROWS
    channels = channel_vectors * VECTOR
    c = tl.program_id(0) % groups * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    image, row, column, lane_inside = placed(program, images, bands, strips, band, out_height, STRIP, LANES)
    top = row * STRIDE - pad_top + first_tap
    left = column * STRIDE - pad_left
    image_t = t + (image * height * width * channels)[:, None] + c[None, :]
    image_dz = dz + (image * out_height * out_width * channels)[:, None] + c[None, :]
    HAS_NORM: tl.constexpr = mean is not None
    if HAS_NORM:
        of_mean, of_scale = load_float(mean + c, c_inside)[None, :], load_float(scale + c, c_inside)[None, :]
        of_bias = load_float(bias + c, c_inside)[None, :]

    INPUTS: tl.constexpr = (STRIP - 1) * STRIDE + KERNEL_WIDTH
    PENDING: tl.constexpr = (TAP_ROWS - 1) // STRIDE + 1  # rows of dz that a row of t meets, the oldest first
    met = ()
    for _new in tl.static_range(PENDING * STRIP):
        met = met + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
    sums = ()
    for _new in tl.static_range(TAP_ROWS * KERNEL_WIDTH):
        sums = sums + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
    for step in range(steps):
        row_new = row + step
        lane_new = lane_inside & (step < band) & (row_new < out_height)
        if WIDE:
            row_new = row_new.to(tl.int64)
        row_dz = image_dz + (row_new * out_width * channels)[:, None]
        moved = ()
        for younger in tl.static_range(STRIP, PENDING * STRIP):
            moved = moved + (met[younger],)
        for ox in tl.static_range(STRIP):
            inside = (lane_new & (column + ox < out_width))[:, None] & c_inside[None, :]
            moved = moved + (load_float(row_dz + ((column + ox) * channels)[:, None], inside),)
        met = moved
        for s in tl.static_range(STRIDE):
            y_in = top + step * STRIDE + s
            row_inside = lane_inside & (y_in >= 0) & (y_in < height)
            if WIDE:
                y_in = y_in.to(tl.int64)
            row_t = image_t + (y_in * width * channels)[:, None]
            for ix in tl.static_range(INPUTS):
                x_in = left + ix
                inside = (row_inside & (x_in >= 0) & (x_in < width))[:, None] & c_inside[None, :]
                value = load_float(row_t + (x_in * channels)[:, None], inside)
                if HAS_NORM:
                    value, _slope = activate_with_slope((value - of_mean) * of_scale + of_bias, ACTIVATION)
                    value = tl.where(inside, value, 0.0)
                added = ()
                for ky in tl.static_range(TAP_ROWS):
                    for kx in tl.static_range(KERNEL_WIDTH):
                        total = sums[ky * KERNEL_WIDTH + kx]  # type: ignore[var-annotated]
                        if ky % STRIDE == s and ix >= kx and (ix - kx) % STRIDE == 0 and (ix - kx) // STRIDE < STRIP:
                            of_dz = met[(PENDING - 1 - ky // STRIDE) * STRIP + (ix - kx) // STRIDE]  # type: ignore[var-annotated]
                            total += value * of_dz
                        added = added + (total,)
                sums = added
    at = partial + program.to(tl.int64) * (KERNEL_HEIGHT * KERNEL_WIDTH) * channels + c
    for ky in tl.static_range(TAP_ROWS):
        for kx in tl.static_range(KERNEL_WIDTH):
            tap = (first_tap + ky) * KERNEL_WIDTH + kx
            inside = c_inside & (first_tap + ky < KERNEL_HEIGHT)
            tl.store(at + tap * channels, tl.sum(sums[ky * KERNEL_WIDTH + kx], axis=0), mask=inside)


class Cut(NamedTuple):
    """The division of a walk: `training.PassCut`'s, with strips and bands.

    Attributes:
        strip: pixels of a row that a lane computes.
        band, bands: rows of a band, bands of an image.
        strips: of a row.
        programs: along the lanes of all images.
    """

    vector: int
    strip: int
    lanes: int
    block: int
    groups: int
    band: int
    bands: int
    strips: int
    programs: int
    warps: int


def cut_of(images: int, out_height: int, out_width: int, channels: int, vector: int, of_thread: int, strip: int) -> Cut:
    """Return the cut for results of this size, with so many elements of a tile to a thread."""
    block = training.block_of(channels)
    bands = _launch.divide_up(out_height, _BAND)
    band = _launch.divide_up(out_height, bands)
    band += band % 2  # even, so that every band of rows apart begins alike
    bands = _launch.divide_up(out_height, band)
    strips = _launch.divide_up(out_width, strip)
    count = images * bands * strips
    lanes = min(max(1, _THREADS * of_thread // block), _launch.next_power_of_2(count))
    warps = max(1, min(128, lanes * block // of_thread) // 32)
    groups = _launch.divide_up(channels, block)
    return Cut(vector, strip, lanes, block, groups, band, bands, strips, _launch.divide_up(count, lanes), warps)


def _is_wide(*images: Tensor) -> bool:
    return any(t[0].numel() >= 1 << 30 for t in images)


def _of_thread(vector: int, kernel: Sequence[int], most: int) -> int:
    """Elements of a tile that a thread has: it has registers for the rows that wait and for their taps."""
    return min(vector, most if kernel[0] * kernel[1] <= 9 else 4 if max(kernel) <= 5 else 2)


def depthwise(
    t: Tensor, mean: Tensor | None, inverse_deviation: Tensor | None, scale: Tensor | None, bias: Tensor | None,
    activation: str, weight: Tensor, conv_bias: Tensor | None, stride: int, padding: Sequence[int],
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `torch.ops.effkernels.training_depthwise`; so is the function below of the name of its."""
    images, height, width, channels = t.shape
    kernel = weight.shape[2:]
    out_height, out_width = (
        (size + sum(pads) - taps) // stride + 1
        for size, taps, pads in zip((height, width), kernel, (padding[:2], padding[2:]), strict=True)
    )
    z = t.new_empty(images, out_height, out_width, channels)
    vector = training.vector_for(t, z)
    cut = cut_of(images, out_height, out_width, channels, vector, _of_thread(vector, kernel, 8), 2)
    partial = torch.empty((3, cut.programs, channels), dtype=torch.float64, device=t.device)
    _convolve(
        z, t, None, (mean, inverse_deviation, scale, bias), activation, weight, conv_bias, partial, cut, stride, 1,
        padding[0], padding[2],
    )  # fmt: skip
    return z, training.norm_of_moments(partial, norm_weight, norm_bias, eps)


def depthwise_backward(
    g: Tensor, z: Tensor, z_mean: Tensor, z_inverse_deviation: Tensor, z_scale: Tensor, z_bias: Tensor,
    z_activation: str, factor: Tensor | None, offset: Tensor | None, alpha: Tensor, beta: Tensor, delta: Tensor,
    t: Tensor, mean: Tensor | None, inverse_deviation: Tensor | None, scale: Tensor | None, bias: Tensor | None,
    activation: str, weight: Tensor, stride: int, padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z_norm = z_mean, z_inverse_deviation, z_scale, z_bias
    dz = training.apply(z, z_norm, z_activation, factor, offset, g, (alpha, beta, delta))
    norm = mean, inverse_deviation, scale, bias
    images, height, width, channels = t.shape
    kernel = weight.shape[2:]
    dt = torch.empty_like(t)
    vector = training.vector_for(t, dz)
    cut = cut_of(images, height, width, channels, vector, _of_thread(vector, kernel, 4), 2)
    partial = torch.empty((2, cut.programs, channels), dtype=torch.float64, device=t.device)
    pads = (taps - 1 - pad for taps, pad in zip(kernel, (padding[0], padding[2]), strict=True))
    _convolve(dt, dz, t, norm, activation, weight.flip(2, 3), None, partial, cut, 1, stride, *pads)
    sums = partial.sum(1) if mean is not None else partial.new_empty(0, channels)
    return dt, _weight_gradient(dz, t, norm, activation, kernel, stride, padding, vector), sums


def _convolve(
    y: Tensor, x: Tensor, t: Tensor | None, norm: Sequence[Tensor | None], activation: str, weight: Tensor,
    conv_bias: Tensor | None, partial: Tensor, cut: Cut, stride: int, apart: int, pad_top: int, pad_left: int,
) -> None:  # fmt: skip
    channels, _, kernel_height, kernel_width = weight.shape
    if apart == 1:
        steps = cut.band + (kernel_height - 1) // stride
    else:
        steps = (cut.band - 2 - pad_top % 2 + kernel_height) // 2 + 1
    _launch.run(
        convolve_kernel, (cut.programs * cut.groups,), y, x, t, *map(_launch.dense, norm), _taps(weight, cut),
        _launch.dense(conv_bias), partial, x.shape[0], channels // cut.vector, x.shape[1], x.shape[2], y.shape[1],
        y.shape[2], pad_top, pad_left, cut.groups, cut.programs, cut.bands, cut.strips, cut.band, steps,
        KERNEL_HEIGHT=kernel_height, KERNEL_WIDTH=kernel_width, STRIDE=stride, APART=apart,
        TOP_ODD=pad_top % 2 if apart > 1 else 0, LEFT_ODD=pad_left % 2 if apart > 1 else 0, STRIP=cut.strip,
        LANES=cut.lanes, BLOCK=cut.block, VECTOR=cut.vector, WIDE=_is_wide(x, y), ACTIVATION=activation,
        num_warps=cut.warps,
    )  # fmt: skip


def _weight_gradient(
    dz: Tensor, t: Tensor, norm: Sequence[Tensor | None], activation: str, kernel: Sequence[int], stride: int,
    padding: Sequence[int], vector: int,
) -> Tensor:  # fmt: skip
    """The gradient of the weight (C, 1, KH, KW) in float32."""
    images, out_height, out_width, channels = dz.shape
    of_thread = min(vector, 4)
    tap_rows = max(1, min(kernel[0], _MOST_TAP_SUMS // (of_thread * kernel[1])))
    # Of two neighbours with stride 2, the inputs and the sums of 5x5 taps take more registers than there are.
    strip = 1 if stride > 1 and kernel[0] * kernel[1] > 9 else 2
    cut = cut_of(images, out_height, out_width, channels, vector, of_thread, strip)
    partial = torch.empty((cut.programs, *kernel, channels), dtype=torch.float32, device=t.device)
    mean, _, scale, bias = norm
    _launch.run(
        weight_gradient_kernel, (cut.programs * cut.groups, _launch.divide_up(kernel[0], tap_rows)), partial, dz, t,
        *map(_launch.dense, (mean, scale, bias)), images, channels // vector, t.shape[1], t.shape[2], out_height,
        out_width, padding[0], padding[2], cut.groups, cut.programs, cut.bands, cut.strips, cut.band,
        cut.band + (tap_rows - 1) // stride, KERNEL_HEIGHT=kernel[0], KERNEL_WIDTH=kernel[1], TAP_ROWS=tap_rows,
        STRIDE=stride, STRIP=cut.strip, LANES=cut.lanes, BLOCK=cut.block, VECTOR=vector, WIDE=_is_wide(t, dz),
        ACTIVATION=activation, num_warps=cut.warps,
    )  # fmt: skip
    total = partial.sum(0, dtype=torch.float64).float()
    return total.permute(2, 0, 1).unsqueeze(1).contiguous()


def _taps(weight: Tensor, cut: Cut) -> Tensor:
    """(C, 1, KH, KW) as (groups, KH * KW, block) in float32.

    The taps of neighbouring channels are adjacent, and all taps of a program are at fixed distances from its first one,
    so that it needs no address for each of them. Channels that are not there have zeros.
    """
    taps = weight.new_zeros(cut.groups * cut.block, weight.shape[2] * weight.shape[3], dtype=torch.float32)
    taps[: weight.shape[0]] = weight.flatten(1)
    return taps.view(cut.groups, cut.block, -1).transpose(1, 2).contiguous()


STEPS: dict[str, Any] = {"training_depthwise": depthwise, "training_depthwise_backward": depthwise_backward}

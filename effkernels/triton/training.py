"""The passes of a training step over whole images in Triton: statistics, norms with activations, their gradients.

Programs and data. Images are (N, H, W, C) and contiguous. A program takes LANES pixels by BLOCK channels at a time, a
tile whose channels lie along the threads, 16 bytes each. `apply_kernel` computes one such tile; the others loop over
the pixels of theirs.

Sums. A thread adds few numbers in float32 and keeps what longer sums round off; lanes, programs and images are added in
float64. Statistics are moments (count, mean, sum of squared distances) of distances from a value of the channel, joined
by the formula of Chan, Golub and LeVeque: nothing cancels, whatever the mean is. Programs write partial results and a
second launch joins them in their order, so that the bits are the same in every run and nobody waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from effkernels.triton import _launch
from effkernels.triton._common import activate_with_slope, load_float

_WIDEST_BLOCK = 64  # channels of a program: 128 bytes of a pixel in 16 bits, a cache line
_THREADS = 128 if not _launch.INTERPRETED else 4096  # interpreted, time goes with the number of programs
_PROGRAMS = 4  # of each multiprocessor, where every one of them leaves a partial result
_MOST_JOINED = 256  # partial moments that one program joins
_JOINED_BLOCK = 16  # channels of such a program
_SUMS = 6  # of an image and channel


@triton.jit
def add_kept(total, rest, value):
    """Return total + value, and `rest` with what that addition rounded off."""
    larger = total + value
    added = larger - total
    return larger, rest + ((total - (larger - added)) + (value - added))


@triton.jit
def sum_of_lanes(total, rest):
    """Return the sum over the lanes, in float64; `rest` counts for nothing where a value was infinite."""
    return tl.sum(total.to(tl.float64) + tl.where(rest == rest, rest, 0.0).to(tl.float64), axis=0)


@triton.jit
def join_moments(count, mean, squares, k, mean_k, squares_k):
    """Join the moments of `count` numbers and of `k` others; counts are (LANES, 1), at least one above zero or 0."""
    share = k / tl.maximum(count + k, 1.0)
    distance = mean_k - mean
    return count + k, mean + distance * share, squares + squares_k + distance * distance * (count * share)


@triton.jit
def store_moments(partial, program, programs, c, channels, count, pivot, mean, squares):
    """Join the lanes' moments in float64 and store count, mean and squares of `program` in partial (3, programs, C).

    count is (LANES, 1); mean, of the distances from pivot, and squares are (LANES, BLOCK).
    """
    n = count.to(tl.float64)
    means = tl.where(count > 0.0, pivot.to(tl.float64) + mean.to(tl.float64), 0.0)
    total = tl.sum(n, axis=0)
    joint = tl.sum(n * means, axis=0) / tl.maximum(total, 1.0)
    distance = means - joint[None, :]
    joint_squares = tl.sum(squares.to(tl.float64) + n * distance * distance, axis=0)
    inside = c < channels
    at = partial + program.to(tl.int64) * channels + c
    step = programs.to(tl.int64) * channels
    tl.store(at, joint_squares * 0.0 + total, mask=inside)
    tl.store(at + step, joint, mask=inside)
    tl.store(at + 2 * step, joint_squares, mask=inside)


@triton.jit(do_not_specialize=["rows", "span", "channels", "parts"])
def join_kernel(
    result, partial, weight, bias, eps, rows, span, channels, parts, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    FINAL: tl.constexpr,
):  # fmt: skip
    """Join `span` rows of moments (3, rows, C) to one of (3, parts, C), or all of them to the rows (6, C) of a norm."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    step = rows.to(tl.int64) * channels
    first = part * span
    last = tl.minimum(first + span, rows)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    weighted = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        at = partial + r[:, None].to(tl.int64) * channels + c[None, :]
        mask = (r < last)[:, None] & inside[None, :]
        n = tl.load(at, mask=mask, other=0.0)
        total += n
        weighted += n * tl.load(at + step, mask=mask, other=0.0)
    count = tl.sum(total, axis=0)
    mean = tl.sum(weighted, axis=0) / tl.maximum(count, 1.0)
    squared = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
    for start in range(first, last, ROWS):
        r = start + tl.arange(0, ROWS)
        at = partial + r[:, None].to(tl.int64) * channels + c[None, :]
        mask = (r < last)[:, None] & inside[None, :]
        distance = tl.load(at + step, mask=mask, other=0.0) - mean[None, :]
        squares = tl.load(at + 2 * step, mask=mask, other=0.0)
        squared += squares + tl.load(at, mask=mask, other=0.0) * distance * distance
    squares = tl.sum(squared, axis=0)
    if FINAL:
        variance = squares / tl.maximum(count, 1.0)
        inverse = 1.0 / tl.sqrt(variance.to(tl.float32).to(tl.float64) + eps)
        scale = inverse
        if weight is not None:
            scale *= load_float(weight + c, inside).to(tl.float64)
        shift = tl.zeros((BLOCK,), dtype=tl.float32)
        if bias is not None:
            shift += load_float(bias + c, inside)
        tl.store(result + c, mean.to(tl.float32), mask=inside)
        tl.store(result + channels + c, variance.to(tl.float32), mask=inside)
        unbiased = squares / tl.maximum(count - 1.0, 1.0)
        tl.store(result + 2 * channels + c, tl.where(count > 1.0, unbiased, variance).to(tl.float32), mask=inside)
        tl.store(result + 3 * channels + c, inverse.to(tl.float32), mask=inside)
        tl.store(result + 4 * channels + c, scale.to(tl.float32), mask=inside)
        tl.store(result + 5 * channels + c, shift, mask=inside)
    else:
        at = result + part.to(tl.int64) * channels + c
        step = parts.to(tl.int64) * channels
        tl.store(at, count, mask=inside)
        tl.store(at + step, mean, mask=inside)
        tl.store(at + 2 * step, squares, mask=inside)


@triton.jit(do_not_specialize=["pixels", "span", "channel_vectors", "groups", "tiles"])
def statistics_kernel(
    partial, t, pixels, span, channel_vectors, groups, tiles, LANES: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Write the moments of `span` pixels of the batch into partial (3, tiles, C)."""
    program = tl.program_id(0)
    group = program % groups
    tile = program // groups
    channels = channel_vectors * VECTOR
    c = group * BLOCK + tl.arange(0, BLOCK)
    c_inside = (c < channels)[None, :]
    lane = tl.arange(0, LANES)
    first = tile.to(tl.int64) * span
    last = tl.minimum(first + span, pixels)
    t += c[None, :]

    count = tl.zeros((LANES, 1), dtype=tl.float32)
    pivot = load_float(t + (first + lane)[:, None] * channels, (first + lane < last)[:, None] & c_inside)
    mean = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    squares = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    for start in range(first, last, LANES * UNROLL):
        k = tl.zeros((LANES, 1), dtype=tl.float32)
        sum_k = tl.zeros((LANES, BLOCK), dtype=tl.float32)
        values = ()
        for u in tl.static_range(UNROLL):
            pixel = start + u * LANES + lane
            inside = (pixel < last)[:, None]
            value = load_float(t + pixel[:, None] * channels, inside & c_inside) - pivot
            values = values + (value,)
            k += tl.where(inside, 1.0, 0.0)
            sum_k += tl.where(inside, value, 0.0)
        mean_k = sum_k / tl.maximum(k, 1.0)
        squares_k = tl.zeros((LANES, BLOCK), dtype=tl.float32)
        for u in tl.static_range(UNROLL):
            inside = (start + u * LANES + lane < last)[:, None]
            distance = tl.where(inside, values[u] - mean_k, 0.0)
            squares_k += distance * distance
        count, mean, squares = join_moments(count, mean, squares, k, mean_k, squares_k)
    store_moments(partial, tile, tiles, c, channels, count, pivot, mean, squares)


@triton.jit(do_not_specialize=["rows", "pixels", "channel_vectors", "groups"])
def apply_kernel(
    y, g, t, mean, inverse_deviation, scale, bias, alpha, beta, delta, factor, offset, residual, rows, pixels,
    channel_vectors, groups, LANES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y = activation(norm(t)) * factor + residual; where g is given, the gradient of t:

    y = alpha * (g * factor + offset) * slope + beta * (t - mean) + delta, with slope that of the activation at norm(t).
    """
    program = tl.program_id(0)
    group = program % groups
    channels = channel_vectors * VECTOR
    c = group * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    row = (program // groups).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = (row < rows)[:, None] & c_inside[None, :]
    at = row[:, None] * channels + c[None, :]
    centred = load_float(t + at, inside) - load_float(mean + c, c_inside)[None, :]
    z = centred * load_float(scale + c, c_inside)[None, :] + load_float(bias + c, c_inside)[None, :]
    value, slope = activate_with_slope(z, ACTIVATION)
    if g is not None:
        value = load_float(g + at, inside)
    of_image = (row // pixels)[:, None] * channels + c[None, :]
    if factor is not None:
        value *= load_float(factor + of_image, inside)
    if offset is not None:
        value += load_float(offset + of_image, inside)
    if g is not None:
        value = load_float(alpha + c, c_inside)[None, :] * (value * slope)
        value += load_float(beta + c, c_inside)[None, :] * centred + load_float(delta + c, c_inside)[None, :]
    if residual is not None:
        value += load_float(residual + at, inside)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "span", "channel_vectors", "groups", "chunks", "stride"])
def sums_kernel(
    sums, y, g, t, mean, inverse_deviation, scale, bias, factor, pixels, span, channel_vectors, groups, chunks, stride,
    LANES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Sum `span` pixels of an image into sums (COUNT, N, chunks, C), `stride` elements apart; y too where it is given.

    Without g the one sum is that of activation(norm(t)); with it they are the six of `training_steps.GradientSums`.
    """
    COUNT: tl.constexpr = 1 if g is None else 6
    program = tl.program_id(0)
    group = program % groups
    chunk = program // groups % chunks
    image = (program // groups // chunks).to(tl.int64)
    channels = channel_vectors * VECTOR
    c = group * BLOCK + tl.arange(0, BLOCK)
    c_inside = c < channels
    of_mean, of_scale = load_float(mean + c, c_inside)[None, :], load_float(scale + c, c_inside)[None, :]
    of_bias = load_float(bias + c, c_inside)[None, :]
    of_deviation = load_float(inverse_deviation + c, c_inside)[None, :]
    if factor is not None:
        of_factor = load_float(factor + image * channels + c, c_inside)[None, :]
    first = chunk * span
    last = tl.minimum(first + span, pixels)
    image_at = image * pixels * channels + c[None, :]

    totals = ()
    for _ in tl.static_range(2 * COUNT):
        totals = totals + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
    for start in range(first, last, LANES * UNROLL):
        run = ()
        for _ in tl.static_range(COUNT):
            run = run + (tl.zeros((LANES, BLOCK), dtype=tl.float32),)
        for u in tl.static_range(UNROLL):
            pixel = start + u * LANES + tl.arange(0, LANES)
            inside = (pixel < last)[:, None] & c_inside[None, :]
            at = image_at + pixel[:, None].to(tl.int64) * channels
            centred = load_float(t + at, inside) - of_mean
            value, slope = activate_with_slope(centred * of_scale + of_bias, ACTIVATION)
            value = tl.where(inside, value, 0.0)
            if g is None:
                run = (run[0] + value,)  # type: ignore[misc]
            else:
                slope = tl.where(inside, slope, 0.0)
                h = centred * of_deviation
                of_g = load_float(g + at, inside)
                gs = of_g * slope
                run = (
                    run[0] + value,  # type: ignore[misc]
                    run[1] + of_g * value,  # type: ignore[misc]
                    run[2] + gs,  # type: ignore[misc]
                    run[3] + slope,  # type: ignore[misc]
                    run[4] + gs * h,  # type: ignore[misc]
                    run[5] + slope * h,  # type: ignore[misc]
                )
            if y is not None:
                if factor is not None:
                    value *= of_factor
                tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
        kept = ()
        for i in tl.static_range(COUNT):
            kept = kept + add_kept(totals[2 * i], totals[2 * i + 1], run[i])
        totals = kept
    at = sums + (image * chunks + chunk) * channels + c
    for i in tl.static_range(COUNT):
        tl.store(at + i * stride, sum_of_lanes(totals[2 * i], totals[2 * i + 1]), mask=c_inside)


class PassCut(NamedTuple):
    """The division of a pass: elements of a 16-byte access, pixels and channels of a tile, groups of channels."""

    vector: int
    lanes: int
    block: int
    groups: int
    warps: int


def cut_of(channels: int, vector: int) -> PassCut:
    """Return how a pass over pixels of so many channels is cut."""
    block = block_of(channels)
    lanes = max(1, _THREADS * vector // block)
    warps = max(1, min(_THREADS, 128, lanes * block // vector) // 32)
    return PassCut(vector, lanes, block, _launch.divide_up(channels, block), warps)


def block_of(channels: int) -> int:
    """Return the channels of a program."""
    block = min(_WIDEST_BLOCK, _launch.next_power_of_2(channels))
    if block == _WIDEST_BLOCK and -channels % block >= block // 2:
        block //= 2  # half of the last group would have nothing to do
    return block


def vector_for(*images: Tensor) -> int:
    """Return the elements of a 16-byte access to contiguous (N, H, W, C) images; 1 where none fits."""
    vector = _launch.vector_of(images[0].dtype)
    fits = all(t.shape[3] % vector == 0 and t.data_ptr() % 16 == 0 for t in images)
    return vector if fits else 1


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 without one, as the interpreter's time grows with programs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def norm_of_moments(partial: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Join moments (3, rows, C) to a norm, the rows (6, C) of `training_steps.NormVectors`."""
    _, rows, channels = partial.shape
    groups = _launch.divide_up(channels, _JOINED_BLOCK)
    while rows > _MOST_JOINED:
        parts = _launch.divide_up(rows, _MOST_JOINED)
        joined = partial.new_empty(3, parts, channels)
        span = _launch.divide_up(rows, parts)
        _launch.run(
            join_kernel, (groups, parts), joined, partial, None, None, 0.0, rows, span, channels, parts,
            ROWS=16, BLOCK=_JOINED_BLOCK, FINAL=False,
        )  # fmt: skip
        partial, rows = joined, parts
    result = torch.empty((6, channels), dtype=torch.float32, device=partial.device)
    _launch.run(
        join_kernel, (groups, 1), result, partial, *map(_launch.dense, (weight, bias)), eps, rows, rows, channels, 1,
        ROWS=16, BLOCK=_JOINED_BLOCK, FINAL=True,
    )  # fmt: skip
    return result


def statistics(t: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """As `torch.ops.effkernels.training_statistics`; so are the functions below of the names of theirs."""
    channels = t.shape[3]
    pixels = t.numel() // channels
    cut = cut_of(channels, vector_for(t))
    unroll = 4
    at_once = cut.lanes * unroll
    most = _launch.divide_up(_PROGRAMS * multiprocessors(t.device), cut.groups)
    span = _launch.divide_up(_launch.divide_up(pixels, at_once), most) * at_once
    tiles = _launch.divide_up(pixels, span)
    partial = torch.empty((3, tiles, channels), dtype=torch.float64, device=t.device)
    _launch.run(
        statistics_kernel, (tiles * cut.groups,), partial, t, pixels, span, channels // cut.vector, cut.groups, tiles,
        LANES=cut.lanes, BLOCK=cut.block, VECTOR=cut.vector, UNROLL=unroll, num_warps=cut.warps,
    )  # fmt: skip
    return norm_of_moments(partial, weight, bias, eps)


def apply(
    t: Tensor,
    norm: Sequence[Tensor],
    activation: str,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
    g: Tensor | None = None,
    coefficients: Sequence[Tensor | None] = (None,) * 3,
    residual: Tensor | None = None,
) -> Tensor:
    """What `apply_kernel` computes of contiguous (N, H, W, C) images, in t's dtype."""
    y = torch.empty_like(t)
    batch, height, width, channels = t.shape
    cut = cut_of(channels, vector_for(*(image for image in (t, y, g, residual) if image is not None)))
    rows = batch * height * width
    _launch.run(
        apply_kernel, (_launch.divide_up(rows, cut.lanes) * cut.groups,), y, g, t, *map(_launch.dense, norm),
        *map(_launch.dense, (*coefficients, factor, offset)), residual, rows, height * width, channels // cut.vector,
        cut.groups, LANES=cut.lanes, BLOCK=cut.block, VECTOR=cut.vector, ACTIVATION=activation, num_warps=cut.warps,
    )  # fmt: skip
    return y


def norm_act(
    t: Tensor, mean: Tensor, inverse_deviation: Tensor, scale: Tensor, bias: Tensor, activation: str,
    factor: Tensor | None, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return apply(t, (mean, inverse_deviation, scale, bias), activation, factor, residual=residual)


def norm_backward(
    dy: Tensor, t: Tensor, mean: Tensor, inverse_deviation: Tensor, scale: Tensor, bias: Tensor, activation: str,
    alpha: Tensor, beta: Tensor, delta: Tensor, factor: Tensor | None,
) -> Tensor:  # fmt: skip
    norm = mean, inverse_deviation, scale, bias
    return apply(t, norm, activation, factor, g=dy, coefficients=(alpha, beta, delta))


def _sums(
    t: Tensor, norm: Sequence[Tensor], activation: str, g: Tensor | None, y: Tensor | None, factor: Tensor | None
) -> Tensor:
    """The sums (count, N, C) of `sums_kernel`."""
    batch, height, width, channels = t.shape
    pixels, count, unroll = height * width, 1 if g is None else _SUMS, 2
    cut = cut_of(channels, vector_for(*(image for image in (t, g, y) if image is not None)))
    if g is not None and cut.vector == 8 and not _launch.INTERPRETED:
        cut = cut._replace(lanes=max(1, cut.lanes // 2))  # 12 sums of 8 channels take too many registers
    at_once = cut.lanes * unroll
    # One program for an image, unless that leaves most of the multiprocessors idle.
    most = _launch.divide_up(_PROGRAMS * multiprocessors(t.device), batch * cut.groups)
    span = _launch.divide_up(_launch.divide_up(pixels, at_once), most) * at_once
    chunks = _launch.divide_up(pixels, span)
    sums = torch.empty((count, batch, chunks, channels), dtype=torch.float64, device=t.device)
    _launch.run(
        sums_kernel, (batch * chunks * cut.groups,), sums, y, g, t, *map(_launch.dense, norm), _launch.dense(factor),
        pixels, span, channels // cut.vector, cut.groups, chunks, sums.stride(0), LANES=cut.lanes, BLOCK=cut.block,
        VECTOR=cut.vector, UNROLL=unroll, ACTIVATION=activation, num_warps=cut.warps,
    )  # fmt: skip
    return sums[:, :, 0] if chunks == 1 else sums.sum(2)


def squeeze(t: Tensor, mean: Tensor, inverse_deviation: Tensor, scale: Tensor, bias: Tensor, activation: str) -> Tensor:
    (sums,) = _sums(t, (mean, inverse_deviation, scale, bias), activation, None, None, None)
    means: Tensor = sums / (t.shape[1] * t.shape[2])
    return means


def gradient_sums(
    g: Tensor, t: Tensor, mean: Tensor, inverse_deviation: Tensor, scale: Tensor, bias: Tensor, activation: str,
    factor: Tensor | None, with_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(t) if with_y else None
    sums = _sums(t, (mean, inverse_deviation, scale, bias), activation, g, y, factor)
    return sums, t.new_empty(0) if y is None else y


STEPS: dict[str, Any] = {
    "training_statistics": statistics,
    "training_norm_act": norm_act,
    "training_squeeze": squeeze,
    "training_gradient_sums": gradient_sums,
    "training_norm_backward": norm_backward,
}

"""The work of a planned launch, from its cut and the counted instructions: what its blocks issue, and wait for.

How often each part of a kernel runs follows from the plan (csrc/cuda/*_plan.cpp, which `cuda_plan` describes) and from
the loops of csrc/cuda/*.cuh; what a warp issues in one pass is `effkernels.plan.kernel_counts`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from effkernels.plan.cut import WARP, Clocks, Cut, Work, ceil_divide, chain_of, tensor_bytes, with_activation
from effkernels.plan.kernel_counts import TAP_VECTORS, Counters, total
from effkernels.plan.record import RecordedCall
from effkernels.plan.work_mbconv import expand_depthwise_work, mbconv_queue_work, mbconv_work, scale_taps
from effkernels.plan.work_pointwise import pointwise_work
from effkernels.plan.work_squeeze import arrival_tail, expand_product, reduce_product, resident_tail


def work_of(cut: Cut, call: RecordedCall) -> Work | None:
    """Return the work of a launch of a call; None for a kernel whose instructions are not counted."""
    family = _FAMILIES.get(cut.kernel)
    if family is None or not (cut.counts.parts or cut.items):
        return None
    if call.op.endswith("expand_depthwise_squeeze") and cut.kernel != "expand_depthwise":
        call = _half_of_expand(call, first=cut.kernel == "pointwise")
    return family(cut, call)


def _half_of_expand(call: RecordedCall, *, first: bool) -> RecordedCall:
    """Return the pointwise or depthwise operator of one of the two launches of `expand_depthwise_squeeze`."""
    x, weight = call.arguments["x"], call.arguments["expand_weight"]
    hidden = x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]), device="meta")
    if first:
        arguments = {"x": x, "weight": weight, "gate": None, "residual": None}
        arguments["activation"] = call.arguments["expand_activation"]
        return replace(call, op="effkernels::pointwise_bn_act", arguments=arguments, results=[hidden])
    return replace(call, op="effkernels::depthwise_bn_act_squeeze", arguments={**call.arguments, "x": hidden})


@dataclass(frozen=True)
class _Strips:
    """Averages over the strips of one image.

    Attributes:
        rows, border_rows: rows of taps that a warp adds up in a strip inside, and in one at the left or right border.
    """

    rows: float
    border_rows: float


@functools.cache
def _strips(
    sizes: tuple[int, int, int, int], pads: tuple[int, int], kernel: int, stride: int, strip: int, neighbours: int
) -> _Strips:
    """Count the strips of a plane as csrc/cuda/depthwise.cuh walks over them.

    Args:
        sizes: height and width of x, then of the result.
        pads: above and on the left.
        neighbours: strips below each other that one warp has at a time; it runs a row that one of them needs.
    """
    height, width, out_height, out_width = sizes
    columns, inputs = ceil_divide(out_width, strip), (strip - 1) * stride + kernel
    rows = border_rows = 0.0
    lefts = [column * strip * stride - pads[1] for column in range(columns)]
    inside = sum(left >= 0 and left + inputs <= width for left in lefts)
    for first in range(0, out_height, neighbours):
        last = min(first + neighbours, out_height) - 1
        top, bottom = first * stride - pads[0], last * stride - pads[0]
        # Row ky of the taps runs when it is inside x for any of the neighbouring strips.
        run = sum(any(0 <= y + ky < height for y in range(top, bottom + 1, stride)) for ky in range(kernel))
        weight = last - first + 1
        rows += weight * inside * run
        border_rows += weight * (columns - inside) * run
    strips = columns * out_height
    return _Strips(rows / strips, border_rows / strips)


def _depthwise(cut: Cut, call: RecordedCall) -> Work:
    part = cut.counts.part
    batch, channels, height, width = call.arguments["x"].shape
    out_height, out_width = call.results[0].shape[2:]
    kernel, stride, padding = call.arguments["weight"].shape[2], call.arguments["stride"], call.arguments["padding"]
    size, vectors, lanes = call.dtype.itemsize, cut["channel_vectors"], cut["lanes"]
    block_channels, warps = vectors * cut["vector"], ceil_divide(vectors * lanes, WARP)
    resident = cut.kernel == "depthwise_resident"
    neighbours = max(1, min(lanes, round(WARP / vectors)))
    plane = (height, width, int(out_height), int(out_width))
    strips = _strips(plane, (padding[0], padding[2]), kernel, stride, cut["strip"], neighbours)
    one_strip = with_activation(cut, "strip", call.arguments["activation"])
    one = total(((one_strip, 1), (part("row"), strips.rows), (part("row.border"), strips.border_rows)))
    rows = strips.rows + strips.border_rows
    strips_of_image = ceil_divide(int(out_width), cut["strip"]) * int(out_height)
    # Warps that a strip of one channel group takes: idle threads of the last warp of a block issue along.
    warps_per_strip = warps / lanes
    issued = one * (batch * cut["channel_groups"] * strips_of_image * warps_per_strip)

    # A pass is TAP_VECTORS of 16 bytes a thread; where there are fewer, all are read, and the others are not written.
    taps = kernel * kernel * block_channels * size / 16 / (TAP_VECTORS * cut.threads)
    slabs = cut["slabs"] if resident else 1
    scale = scale_taps(cut, kernel, block_channels)
    load = replace(part("taps") * taps, trips=float(ceil_divide(taps, 1))) + scale
    issued = issued + total(
        (
            (part("prologue"), cut.grid * cut.warps),
            (part("taps") * taps + scale, cut.grid * slabs * cut.warps),
            (part("slab"), cut.grid * slabs * cut.warps),
            (part("image"), cut.grid * cut["images"] * cut.warps),
            (part("lane"), cut.grid * cut["images"] * slabs * lanes * ceil_divide(block_channels, WARP)),
        )
    )
    # The norm of a channel is asked for before the taps, and waited for after them.
    prologue = chain_of(part("prologue")) + chain_of(load, parameters=load.trips)
    # The lanes of a block have strips below each other: of the rows of one, all but the first `stride` are the first
    # rows of a neighbour, and in L1 by then. A short strip reads its whole window at once.
    waits = Clocks(inputs=min(stride, rows), cached=max(0.0, rows - stride)) if rows else Clocks(inputs=1)
    of_round = chain_of(one) + waits
    of_image = of_round * cut["rounds"] + chain_of(part("image") + part("lane") * lanes)
    body = of_image * cut["images"]
    if resident:
        body = (of_round * cut["rounds"] + chain_of(part("slab") + part("lane") * lanes)) * slabs
        body = body + chain_of(load, parameters=load.trips) * (slabs - 1)
    horizontal = ((cut["strip"] - 1) * stride + kernel) / (cut["strip"] * stride)
    x_bytes = tensor_bytes(call, "x") * max(1.0, horizontal)
    l2_bytes = x_bytes + call.results[0].numel() * size
    last = Clocks()
    gated, pooled = "w_reduce" in call.arguments, call.op.endswith("_squeeze")
    if gated or pooled:
        reduced = call.arguments["w_reduce"].shape[0] if gated else 0
        tail = resident_tail if resident else arrival_tail
        more, in_body, last = tail(cut, reduced, int(channels), block_channels, size)
        issued, body = issued + more, body + in_body
    if resident:
        pixels = ceil_divide(int(out_height), cut["row_blocks"]) * int(out_width)
        passes = ceil_divide(pixels, lanes) * slabs
        issued = issued + part("write") * (cut.grid * passes * warps)
        body = body + chain_of(part("write") * passes)
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, last)


def _stem(cut: Cut, call: RecordedCall) -> Work:
    part, size = cut.counts.part, call.dtype.itemsize
    x, warps, channels = call.arguments["x"], cut["warps"], cut["padded_channels"]
    groups, of_block = channels // WARP, min(cut["tiles"], cut["tiles_per_block"])
    weights = ceil_divide(cut["weight_bytes"] / size, cut.threads)
    units = ceil_divide(cut["window_height"] * cut["window_width"] / (16 / size), cut.threads) if size == 4 else 0
    load = total(((part("prologue"), 1), (part("weights"), weights)))
    tile = total(((part("tile"), 1), (part("channels"), groups - 1), (part("unit"), units)))
    issued = (load * cut.grid + tile * cut["tiles"]) * warps + part("norm") * (cut.grid * groups)
    prologue = chain_of(load, parameters=part("weights").trips) + chain_of(part("norm"), parameters=part("norm").trips)
    body = chain_of(tile * of_block, inputs=of_block if size == 4 else 1)
    window = x.shape[1] * cut["window_height"] * cut["window_width"] * size
    l2_bytes = cut["tiles"] * window + cut.grid * cut["weight_bytes"] + call.results[0].numel() * size
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, Clocks())


def _vectors(cut: Cut, call: RecordedCall, of_vector: Counters, reads: int) -> Work:
    """Return a pass over the result."""
    part, size = cut.counts.part, call.dtype.itemsize
    elements = call.results[0].numel()
    passes = elements / (16 // size) / (cut.grid * cut.threads)
    issued = (part("prologue") + part("norm") + of_vector * passes) * (cut.grid * cut.warps)
    prologue = chain_of(part("prologue")) + chain_of(part("norm"), parameters=part("norm").trips)
    body = chain_of(of_vector, inputs=1) * max(1.0, passes)
    return Work(issued, cut.counts.registers, reads * elements * size, prologue, body, Clocks())


def _norm_act(cut: Cut, call: RecordedCall) -> Work:
    return _vectors(cut, call, with_activation(cut, "vector", call.arguments["activation"]), 2)


def _scale(cut: Cut, call: RecordedCall) -> Work:
    return _vectors(cut, call, cut.counts.part("vector"), 2)


def _excite(cut: Cut, call: RecordedCall) -> Work:
    part, size = cut.counts.part, call.dtype.itemsize
    (batch, channels), reduced = call.arguments["pooled"].shape, call.arguments["w_reduce"].shape[0]
    images = min(cut["images"], batch)
    product, reduce = reduce_product(cut, images, reduced, channels, size)
    expand, gate = expand_product(cut, images, reduced, cut["split_channels"], size)
    issued = (product + expand + part("finish") * cut.warps) * cut.grid
    body = replace(reduce, inputs=1.0) + gate + Clocks(0, 0, 1)
    weights = reduced * (channels + cut["split_channels"]) * size
    return Work(issued, cut.counts.registers, cut.grid * weights, chain_of(part("finish")), body, Clocks())


_FAMILIES: Mapping[str, Callable[[Cut, RecordedCall], Work]] = {
    "depthwise_strips": _depthwise,
    "depthwise_resident": _depthwise,
    "pointwise": pointwise_work,
    "pointwise_pool": pointwise_work,
    "expand_depthwise": expand_depthwise_work,
    "mbconv": mbconv_work,
    "mbconv_queue": mbconv_queue_work,
    "mbconv_stack": mbconv_work,  # a block of it
    "conv_stem": _stem,
    "norm_act": _norm_act,
    "scale_by_gate": _scale,
    "squeeze_excite_gate": _excite,
}

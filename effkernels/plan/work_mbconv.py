"""The work of the kernels that expand: csrc/cuda/expand_depthwise.cuh, and whole blocks as items of a queue
(csrc/cuda/mbconv_queue.cuh) or in clusters (csrc/cuda/mbconv.cuh).
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from effkernels.plan.cut import WARP, Clocks, Cut, Queue, Work, ceil_divide, chain_of, with_activation
from effkernels.plan.kernel_counts import (
    HIDDEN_RANKS_AHEAD,
    LOADS_AHEAD,
    RANKS_AHEAD,
    TAP_VECTORS,
    Counters,
    total,
)
from effkernels.plan.queue_order import QueueOrder
from effkernels.plan.record import RecordedCall
from effkernels.plan.work_pointwise import pointwise_work, product_fill
from effkernels.plan.work_squeeze import arrival_tail

_EXPANDED = 48  # channels of a block of expand_depthwise: kExpandedChannels


def scale_taps(cut: Cut, kernel: int, block_channels: int) -> Counters:
    """Return what a thread's share of the taps takes to multiply by the norm's scales (scale_taps)."""
    if "scale" not in cut.counts.parts:
        return Counters()
    return cut.counts.part("scale") * ceil_divide(kernel * kernel, cut.threads // (block_channels // 4))


def _load(cut: Cut, slices: int, pixels: float, ahead: int = LOADS_AHEAD) -> Counters:
    """Return what a thread's share of some rows of x takes to ask for (load_expand_rows), of `pixels` in a slice.

    Copies of a pass that have no pixel are issued, and go no further.

    Args:
        ahead: pixels of a pass: `LOADS_AHEAD`, or one where mbconv has few.
    """
    name = "load" if ahead == LOADS_AHEAD else "load.few"
    part, passes = cut.counts.part(f"{name}.pixels"), ceil_divide(pixels, ahead)
    copies = pixels / (ahead * passes)
    part = replace(part, memory=part.memory * copies, wavefronts=part.wavefronts * copies)
    return (cut.counts.part(name) + part * slices) * passes


def _places(cut: Cut, rows: int, pixels: float) -> Counters:
    """Return what a warp's share of the places of pixels takes to set (set_places), of `pixels` in a row."""
    of_row = cut.counts.part("places.row") + cut.counts.part("places") * ceil_divide(pixels, WARP)
    return of_row * ceil_divide(rows, cut.warps)


@functools.cache
def _rows_made(
    first: int, end: int, height: int, before: int, kernel: int, stride: int, group_rows: int, at_once: int
) -> tuple[int, ...]:
    """Return how often the threads of a block go over the strips of a group of rows, for each group of a band.

    Args:
        first, end: rows of the result.
        before: rows of padding above.
        at_once: rows of the result that the threads go over together.
    """
    top = max(0, first * stride - before)
    bottom = min((end - 1) * stride - before + kernel, height)
    made, passes = first, []
    for read in (*range(top + group_rows, bottom, group_rows), bottom):
        possible = end if read == bottom else max(made, (read + before - kernel) // stride + 1)
        passes.append(ceil_divide(possible - made, at_once))
        made = possible
    return tuple(passes)


def expand_depthwise_work(cut: Cut, call: RecordedCall, copy: Counters | None = None) -> Work:
    """Follow the walk of csrc/cuda/expand_depthwise.cuh, the averages over bands and tiles for each of them.

    Without expansion a block reads its own channels of x alone, and copies a vector of a pixel into the ring by `copy`.
    """
    part = cut.counts.part
    batch, inner, height, in_width = (int(side) for side in call.arguments["x"].shape)
    out_height, out_width = (int(side) for side in call.results[0].shape[2:])
    channels, stride, padding = int(call.results[0].shape[1]), int(call.arguments["stride"]), call.arguments["padding"]
    kernel, size, width = int(call.arguments["weight"].shape[2]), call.dtype.itemsize, cut["channels"]
    if copy is not None:
        inner = min(inner, width)
    group_rows, lanes, tiles = cut["group_rows"], cut["lanes"], cut["column_tiles"]
    at_once = cut["group_out_rows"]

    def under(first: int, end: int, before: int, most: int) -> int:
        """Return the rows or columns of x under some of y."""
        return min(most, (end - 1) * stride - before + kernel) - max(0, first * stride - before)

    bands = [(first, min(first + cut["band_rows"], out_height)) for first in range(0, out_height, cut["band_rows"])]
    columns = [(first, min(first + cut["columns"], out_width)) for first in range(0, out_width, cut["columns"])]
    rows = sum(under(*band, padding[0], height) for band in bands) / len(bands)
    groups = sum(ceil_divide(under(*band, padding[0], height), group_rows) for band in bands) / len(bands)
    made = sum(sum(_rows_made(*band, height, padding[0], kernel, stride, group_rows, at_once)) for band in bands) / len(
        bands
    )
    pixels = sum(under(*one, padding[2], in_width) for one in columns) / tiles  # of a row
    # A warp multiplies one fragment of 16 pixels at a time, or two.
    name, unit = ("pair", 32) if cut["pairs"] else ("fragment", 16)
    fragments = ceil_divide(rows / groups * pixels, unit)
    of_row = sum(ceil_divide(end - first, cut["strip"]) for first, end in columns) / tiles
    strips = of_row * out_height / len(bands)
    rounds = made * ceil_divide(of_row * at_once, lanes)
    taps_inside = sum(
        0 <= row * stride - padding[0] + tap < height for row in range(out_height) for tap in range(kernel)
    )

    if copy is None:
        fragment = with_activation(cut, name, call.arguments["expand_activation"])
        fragment = fragment + part(f"{name}.slice") * (inner / (64 / size))
    else:
        fragment = copy * (unit * inner / 8 / WARP)
    strip = with_activation(cut, "strip", call.arguments["activation"]) + part("row") * (taps_inside / out_height - 1)
    # Of a thread in a group, and once for a block: a pixel and a row of weights has as many threads as a slice chunks.
    chunks = ceil_divide(inner, 16) * 2
    share, of_share = min(chunks, 4), ceil_divide(chunks, 4)
    load = _load(cut, of_share, fragments * unit * share / cut.threads)
    weights = (part("weights") + part("weights.chunk") * of_share) * ceil_divide(width * share, cut.threads)
    padding = ceil_divide((kernel - 1) * width * size / 16, WARP)
    zeros = (part("zero.row") + part("zero") * padding) * ceil_divide(cut["ring_rows"], cut.warps)
    taps = kernel * kernel * width * size / 16 / (TAP_VECTORS * cut.threads)
    load_taps = replace(part("taps") * taps, trips=float(ceil_divide(taps, 1))) + scale_taps(cut, kernel, width)
    places = _places(cut, group_rows, pixels)
    first = total(((part("prologue"), 1), (weights, copy is None), (load, 1), (places, 1), (zeros, 1)))
    warps_of_strips = strips * (width * size / 16) / WARP
    group = (part("group") + load) * cut.warps + fragment * fragments
    of_image = group * groups + strip * warps_of_strips
    of_image = of_image + part("image") * cut.warps + part("lane") * (lanes * ceil_divide(width, WARP))
    images = batch / ceil_divide(batch, cut["images"])
    issued = ((first + load_taps) * cut.warps + of_image * images) * cut.grid
    chain = (part("group") + load + fragment * ceil_divide(fragments, cut.warps)) * groups + strip * rounds
    # The rows of x of a group are asked for while the strips of the one before it are computed.
    body = chain_of((chain + part("image") + part("lane") * lanes) * images, inputs=1)
    excites = call.arguments.get("w_reduce") is not None
    reduced = call.arguments["w_reduce"].shape[0] if excites else 0
    more, in_body, last = arrival_tail(cut, reduced, channels, width, size)
    prologue = chain_of(first) + chain_of(load_taps, parameters=load_taps.trips)
    # Without expansion the groups of channels share those of x.
    read = inner if copy is None else channels / cut["channel_groups"]
    l2_bytes = cut.grid * (images * rows * pixels + (width if copy is None else 0)) * read * size
    l2_bytes += call.results[0].numel() * size
    return Work(issued + more, cut.counts.registers, l2_bytes, prologue, body + in_body, last)


def mbconv_queue_work(cut: Cut, call: RecordedCall) -> Work:
    """Add up the items of csrc/cuda/mbconv_queue.cuh, each a block of another kernel; a block draws its item first.

    What counts is an average item, and at the end what is left to do by fewer and fewer blocks: see `end_of_queue`.
    """
    given, expand, project = call.arguments, cut.items["expand"], cut.items["project"]
    x, y = given["x"], call.results[0]
    channels = given["weight"].shape[0]
    between = x.new_empty((x.shape[0], channels, *y.shape[2:]), device="meta")
    gate = None if given["w_reduce"] is None else x.new_empty((x.shape[0], channels), device="meta")
    given_project = {"x": between, "weight": given["project_weight"], "gate": gate, "residual": given["residual"]}
    copy = None if given["expand_weight"] is not None else cut.counts.part("copy")
    first = expand_depthwise_work(expand, replace(call, results=[between]), copy)
    second = pointwise_work(project, replace(call, arguments={**given_project, "activation": "identity"}))
    # A warp looks for the item, 32 numbers at a time: the block of the network, where there are several; the round.
    stacked, rounds = cut.sizes.get("stacked", 1), (cut["units"] + cut["ahead"]) * expand["images"] - 1
    steps = max(1, math.ceil(math.log(max(rounds, 2), WARP)))
    draw = cut.counts.part("draw") + cut.counts.part("find") * (stacked > 1) + cut.counts.part("search") * steps
    issued = first.issued + second.issued + draw * cut.grid
    # The number is drawn by an atomic operation; the item is counted as done by another one, after a fence, and the
    # block then leaves by a last one, after a fence that waits for both. One that projects asks for its units.
    drawn, ended, left = Clocks(draw.issued, parameters=1), Clocks(parameters=2), Clocks(parameters=1)
    start = drawn + first.prologue
    of_expand = start + first.body + ended
    start_of_project = drawn + second.prologue - chain_of(product_fill(project, gated=gate is not None)[1])
    of_project = drawn + second.prologue + Clocks(parameters=1) + second.body + ended
    average = of_expand * (expand.grid / cut.grid) + of_project * (project.grid / cut.grid) + left
    pixels = y.shape[2] * y.shape[3]
    order = QueueOrder(
        units=cut["units"], images=expand["images"], expand_items=expand.grid // cut["units"], ahead=cut["ahead"],
        first_round=cut["first_round"], project_items=project.grid, columns=project["column_tiles"],
        unit_rows=expand["images"] * int(pixels), item_rows=project["rows"] * project["tiles"],
    )  # fmt: skip
    queue = Queue(order, start, of_expand, first.last, start_of_project, of_project, left)
    l2_bytes = first.l2_bytes + second.l2_bytes
    return Work(issued, cut.counts.registers, l2_bytes, Clocks(), average, Clocks(), queue)


def _gate_of_cluster(cut: Cut, own: int, reduced: int) -> tuple[Counters, Clocks]:
    """Return squeeze-and-excitation by a block of a cluster that has `own` channels (csrc/cuda/mbconv_gate.cuh): by all
    of its warps, and its chain."""
    part, team = cut.counts.part, cut["team"]
    # 4 threads share a row of w_reduce, 2 a channel of w_expand, of which they take 4 values at a time where they can.
    of_rows = part("gate.reduce.rows") + part("gate.reduce") * ceil_divide(own / 8, 4)
    width = 4 if reduced % 4 == 0 else 1
    of_channels = part("gate.expand.rows") + part("gate.expand") * ceil_divide(reduced / width, 2)
    hidden = part("hidden") + part("hidden.other") * team
    issued, chain = Counters(), Clocks(parameters=1 + ceil_divide(team, HIDDEN_RANKS_AHEAD))
    for one, threads in ((of_rows, reduced * 4), (of_channels, own * 2), (hidden, reduced)):
        issued = issued + one * ceil_divide(threads, WARP)
        chain = chain + chain_of(one * ceil_divide(threads, cut.threads))
    return issued, chain


def mbconv_work(cut: Cut, call: RecordedCall) -> Work:
    """Follow the walk of csrc/cuda/mbconv.cuh. What passes between the blocks of a cluster counts as bytes of L2, and
    a wait for it, or for all of them, as one for L2."""
    part, team, groups, passes = cut.counts.part, cut["team"], cut["groups"], cut["passes"]
    cluster = cut["cluster"]  # in a stack there may be more blocks than the team: they add their share of y alone
    given, size = call.arguments, call.dtype.itemsize
    batch, inner, height, width = (int(side) for side in given["x"].shape)
    _, outer, out_height, out_width = (int(side) for side in call.results[0].shape)
    kernel = int(given["weight"].shape[2])
    pixels, out_pixels, lanes = height * width, out_height * out_width, cut["lanes"]
    name, unit = ("pair", 32) if pixels > 64 else ("fragment", 16)
    fragments, windows = ceil_divide(pixels, unit), lanes * (_EXPANDED * size // 16)  # 8 channels of two parts
    slots = cut["ring_slots"]
    turns = ceil_divide(groups, slots)
    fragment = with_activation(cut, name, given["expand_activation"]) + part(f"{name}.slice") * cut["slices"]
    window = with_activation(cut, "window", given["activation"]) + part("window.row") * kernel
    excites = given["w_reduce"] is not None
    lane = part("lane") * (lanes * excites)
    # More than the first weights and x: those of the next groups, where not all are kept, and of the next image.
    images = batch / ceil_divide(batch, cut["images"])
    loads = part("group.load") * ((turns if cut["weight_slots"] < groups else 1) * (images > 1))

    # What a block copies, of a thread: rows of `slices` or of the block's channels, four chunks each at a time.
    share, held_slices = min(ceil_divide(inner, 16) * 2, 4), ceil_divide(groups * _EXPANDED * size, 64)
    columns = ceil_divide(cut["pass_columns"], 16) * 16
    ahead = LOADS_AHEAD if name == "pair" else 1
    load = _load(cut, cut["slices"], fragments * unit * share / cut.threads, ahead)
    expand_rows, project_rows = (ceil_divide(rows * 4, cut.threads) for rows in (_EXPANDED, columns))
    weights = (part("weights") + part("weights.chunk") * cut["slices"]) * expand_rows
    project = (part("project") + part("project.chunk") * held_slices) * ceil_divide(
        project_rows, 2
    )  # two rows at a time
    lane_sums = (slots * lanes + groups) * _EXPANDED * 4
    ring = slots * cut["ring_rows"] * cut["ring_row_bytes"]
    cleared = lane_sums + held_slices * (cut["held_pixels"] + 1) * 64 + ring
    # The first norms of a thread are asked for before weights or x, which takes longer than they do.
    norms = ceil_divide(2 * ceil_divide(groups * _EXPANDED, WARP) + ceil_divide(outer, WARP), cut.warps)
    own = groups * _EXPANDED
    copies = ceil_divide(kernel * kernel * own * size / 16, cut.threads)
    parameters = part("norm") * norms
    parameters = replace(parameters, trips=float(max(0, norms - 2)))
    reduced = given["w_reduce"].shape[0] if excites else 0
    # Rows of w_reduce have 8 threads each, w_expand is copied as it is.
    gate_rows, gate_chunks = ceil_divide(reduced * 8, cut.threads), ceil_divide(own * size / 16, 8)
    gate_weights = (part("gate.load.row") + part("gate.load") * gate_chunks) * gate_rows
    copies += ceil_divide(reduced * own * size / 16, cut.threads)
    first = total(
        (
            (part("prologue"), 1),
            (weights, cut["weight_slots"]),
            (load, 1),
            (project, 1),
            (gate_weights, 1),
            (part("copy"), copies),
            (_places(cut, height, width), 1),
            (part("zero"), ceil_divide(cleared / 16, cut.threads)),
        )
    )

    # A tile of the project product: 16 or 32 pixels, and columns of 8 output channels, of a share of all.
    high, rows = f"tile.{cut['projected']}", (16, 32)[cut["projected"]]
    across = ceil_divide(columns, cut["tile_columns"])
    tiles, wide = cut["held_pixels"] // rows * across, columns / across / 8
    tile = part(high) + part(f"{high}.columns") * wide
    tile = tile + (part(f"{high}.slice") + part(f"{high}.slice.columns") * wide) * held_slices
    vectors = out_pixels * cut["pass_columns"] / 8
    add = part("add") + part("add.other") * team
    # Of all warps of a block; every thread of a warp that has any work issues along.
    of_group = fragment * fragments + window * windows + lane * ceil_divide(_EXPANDED, WARP)
    of_pass = part("pass") * cut.warps + tile * tiles + add * (vectors / WARP / team)
    of_image = of_group * groups + of_pass * passes
    of_image = of_image + (part("image") + part("group") * turns + loads + load * (1 - 1 / images)) * cut.warps
    fragment_turns, window_turns = (ceil_divide(slots * of_one, cut.warps) for of_one in (fragments, windows))
    chain = (part("group") + fragment * fragment_turns + window * window_turns + lane) * turns + loads
    adds = ceil_divide(vectors, cluster * cut.threads)
    chain = chain + (part("pass") + tile * ceil_divide(tiles, cut.warps) + add * adds) * passes + part("image")
    waits = passes * (2 + adds * ceil_divide(team, RANKS_AHEAD))
    # In a stack the parameters are asked for while the block waits for the results of the one before.
    waits -= 1 if cut.sizes.get("follows", 0) and not cut["waits_first"] else 0
    body = chain_of(chain, inputs=1, parameters=waits)
    if excites:
        gate, of_gate = _gate_of_cluster(cut, own, reduced)
        of_image, body = of_image + gate, body + of_gate
    issued = ((first + parameters) * cut.warps + of_image * images) * (cut.grid * team / cluster)
    prologue = chain_of(first) + chain_of(parameters, parameters=parameters.trips)
    of_weights = (inner * groups * _EXPANDED + groups * _EXPANDED * outer) * size
    between = 4 * team * out_pixels * outer
    l2_bytes = cut.grid * team / cluster * (images * pixels * inner * size + of_weights) + batch * (
        between + out_pixels * outer * size
    )
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body * images, Clocks())

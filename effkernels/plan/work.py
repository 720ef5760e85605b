"""The work of a planned launch, from its cut and the counted instructions: what its blocks issue, and wait for.

How often each part of a kernel runs follows from the plan (csrc/cuda/*_plan.cpp, which `cuda_plan` describes) and from
the loops of csrc/cuda/*.cuh; what a warp issues in one pass is `effkernels.plan.kernel_counts`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from effkernels.plan.kernel_counts import (
    EXPAND_AHEAD,
    HIDDEN_AHEAD,
    HIDDEN_RANKS_AHEAD,
    LOADS_AHEAD,
    RANKS_AHEAD,
    TAP_VECTORS,
    TILES_AHEAD,
    Counters,
    KernelCounts,
    Sums,
    reduce_lanes,
    total,
)
from effkernels.plan.queue_order import QueueOrder
from effkernels.plan.record import RecordedCall

WARP = 32
_ANY_EPILOGUE = 2  # of a product, whose sums go through shared memory: PointwiseEpilogue::kAny
_EXPANDED = 48  # channels of a block of expand_depthwise: kExpandedChannels
_FLAT = ("identity", "relu", "relu6", "hard_swish")  # no special functions


@dataclass(frozen=True)
class Clocks(Sums):
    """A chain of instructions and round trips that follow each other within a warp.

    Attributes:
        issued: instructions.
        inputs: waits for data that another launch wrote.
        parameters: waits for parameters, or for what other blocks of this launch wrote: from L2.
        cached: waits for data that a neighbour has just read: from L1.
        arrivals: writes made visible and counted, for the block that comes last.
    """

    issued: float = 0.0
    inputs: float = 0.0
    parameters: float = 0.0
    arrivals: float = 0.0
    cached: float = 0.0


@dataclass(frozen=True)
class Queue:
    """Items in their order, and their chains: as of `QueuedBlock`."""

    order: QueueOrder
    start: Clocks
    expand: Clocks
    gate: Clocks
    project_start: Clocks
    project: Clocks
    leave: Clocks


@dataclass(frozen=True)
class Work:
    """The work of one launch.

    Attributes:
        issued: by all warps of all blocks.
        registers: of a thread.
        l2_bytes: between L2 and the multiprocessors: tiles and borders as often as blocks read them.
        prologue: chain of a block before its first input.
        body: chain of a block after that.
        last: chain of the last block alone, once all others are done: squeeze-and-excitation by last arrival.
        queue: the items whose order blocks follow, and that wait for each other.
    """

    issued: Counters
    registers: int
    l2_bytes: float
    prologue: Clocks
    body: Clocks
    last: Clocks
    queue: Queue | None = None


@dataclass(frozen=True)
class Cut:
    """The division of a launch into blocks.

    Attributes:
        kernel: its name without template arguments.
        grid, threads: blocks, and threads of a block.
        sizes: further numbers of the plan by name, as `cuda_plan` gives them.
        counts: the kernel's instructions.
        items: of a queue, by kind: the launches whose blocks they are.
    """

    kernel: str
    grid: int
    threads: int
    sizes: Mapping[str, int]
    counts: KernelCounts
    items: Mapping[str, Cut] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def warps(self) -> int:
        """Of a block."""
        return _ceil(self.threads, WARP)


def _ceil(value: float, by: float) -> int:
    return int(-(-value // by))


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


def _chain(counters: Counters, *, inputs: float = 0.0, parameters: float = 0.0) -> Clocks:
    return Clocks(counters.issued, inputs, parameters)


def _with_activation(cut: Cut, part: str, activation: str) -> Counters:
    """Return a part that activates: its way with special functions, or that without."""
    return cut.counts.part(f"{part}.plain" if activation in _FLAT else part)


def _tensor_bytes(call: RecordedCall, name: str) -> int:
    tensor = call.arguments.get(name)
    return 0 if tensor is None else int(tensor.numel() * tensor.element_size())


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
    columns, inputs = _ceil(out_width, strip), (strip - 1) * stride + kernel
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


def _gate_products(cut: Cut, images: int, reduced: int, channels: int, size: int) -> tuple[Counters, Clocks]:
    """Return the first product of squeeze-and-excitation by one block, over `channels`: by all warps, and its chain.

    A warp has several rows at a time, and two such in turn.
    """
    part, lanes = cut.counts.part, reduce_lanes(cut.kernel)
    vectors = _ceil(channels, lanes * (16 // size))
    one = total(
        (
            (part("reduce.row"), 1),
            (part("reduce.row.image"), images),
            (part("reduce"), vectors),
            (part("reduce.image"), vectors * images),
        )
    )
    passes = _ceil(reduced, WARP // lanes * cut.warps)
    chain = _chain(one, parameters=_ceil(vectors, 4)) * passes
    return one * _ceil(reduced, WARP // lanes), chain


def _expand_product(cut: Cut, images: int, reduced: int, channels: int, size: int) -> tuple[Counters, Clocks]:
    """Return the second product by one block, a channel a thread: by all warps, and its chain."""
    widest = 16 // size
    width = next(one for one in (widest, 4, 2, 1) if reduced % one == 0)
    part, vectors = cut.counts.part, reduced // width
    one = total(
        (
            (part(f"expand.{width}.channel"), 1),
            (part(f"expand.{width}.channel.image"), images),
            (part(f"expand.{width}"), vectors),
            (part(f"expand.{width}.image"), vectors * images),
        )
    )
    passes = _ceil(channels, cut.threads)
    chain = _chain(one, parameters=_ceil(vectors, EXPAND_AHEAD)) * passes
    return one * _ceil(channels, WARP), chain


def _depthwise(cut: Cut, call: RecordedCall) -> Work:
    part = cut.counts.part
    batch, channels, height, width = call.arguments["x"].shape
    out_height, out_width = call.results[0].shape[2:]
    kernel, stride, padding = call.arguments["weight"].shape[2], call.arguments["stride"], call.arguments["padding"]
    size, vectors, lanes = call.dtype.itemsize, cut["channel_vectors"], cut["lanes"]
    block_channels, warps = vectors * cut["vector"], _ceil(vectors * lanes, WARP)
    resident = cut.kernel == "depthwise_resident"
    neighbours = max(1, min(lanes, round(WARP / vectors)))
    plane = (height, width, int(out_height), int(out_width))
    strips = _strips(plane, (padding[0], padding[2]), kernel, stride, cut["strip"], neighbours)
    one_strip = _with_activation(cut, "strip", call.arguments["activation"])
    one = total(((one_strip, 1), (part("row"), strips.rows), (part("row.border"), strips.border_rows)))
    rows = strips.rows + strips.border_rows
    strips_of_image = _ceil(int(out_width), cut["strip"]) * int(out_height)
    # Warps that a strip of one channel group takes: idle threads of the last warp of a block issue along.
    warps_per_strip = warps / lanes
    issued = one * (batch * cut["channel_groups"] * strips_of_image * warps_per_strip)

    # A pass is TAP_VECTORS of 16 bytes a thread; where there are fewer, all are read, and the others are not written.
    taps = kernel * kernel * block_channels * size / 16 / (TAP_VECTORS * cut.threads)
    slabs = cut["slabs"] if resident else 1
    scale = _scale_taps(cut, kernel, block_channels)
    load = replace(part("taps") * taps, trips=float(_ceil(taps, 1))) + scale
    issued = issued + total(
        (
            (part("prologue"), cut.grid * cut.warps),
            (part("taps") * taps + scale, cut.grid * slabs * cut.warps),
            (part("slab"), cut.grid * slabs * cut.warps),
            (part("image"), cut.grid * cut["images"] * cut.warps),
            (part("lane"), cut.grid * cut["images"] * slabs * lanes * _ceil(block_channels, WARP)),
        )
    )
    # The norm of a channel is asked for before the taps, and waited for after them.
    prologue = _chain(part("prologue")) + _chain(load, parameters=load.trips)
    # The lanes of a block have strips below each other: of the rows of one, all but the first `stride` are the first
    # rows of a neighbour, and in L1 by then. A short strip reads its whole window at once.
    waits = Clocks(inputs=min(stride, rows), cached=max(0.0, rows - stride)) if rows else Clocks(inputs=1)
    of_round = _chain(one) + waits
    of_image = of_round * cut["rounds"] + _chain(part("image") + part("lane") * lanes)
    body = of_image * cut["images"]
    if resident:
        body = (of_round * cut["rounds"] + _chain(part("slab") + part("lane") * lanes)) * slabs
        body = body + _chain(load, parameters=load.trips) * (slabs - 1)
    horizontal = ((cut["strip"] - 1) * stride + kernel) / (cut["strip"] * stride)
    x_bytes = _tensor_bytes(call, "x") * max(1.0, horizontal)
    l2_bytes = x_bytes + call.results[0].numel() * size
    last = Clocks()
    gated, pooled = "w_reduce" in call.arguments, call.op.endswith("_squeeze")
    if gated or pooled:
        reduced = call.arguments["w_reduce"].shape[0] if gated else 0
        tail = _resident_tail if resident else _arrival_tail
        more, in_body, last = tail(cut, reduced, int(channels), block_channels, size)
        issued, body = issued + more, body + in_body
    if resident:
        pixels = _ceil(int(out_height), cut["row_blocks"]) * int(out_width)
        passes = _ceil(pixels, lanes) * slabs
        issued = issued + part("write") * (cut.grid * passes * warps)
        body = body + _chain(part("write") * passes)
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, last)


def _scale_taps(cut: Cut, kernel: int, block_channels: int) -> Counters:
    """Return what a thread's share of the taps takes to multiply by the norm's scales (scale_taps)."""
    if "scale" not in cut.counts.parts:
        return Counters()
    return cut.counts.part("scale") * _ceil(kernel * kernel, cut.threads // (block_channels // 4))


def _load(cut: Cut, slices: int, pixels: float) -> Counters:
    """Return what a thread's share of some rows of x takes to ask for (load_expand_rows), of `pixels` in a slice.

    Copies of a pass that have no pixel are issued, and go no further.
    """
    part, passes = cut.counts.part("load.pixels"), _ceil(pixels, LOADS_AHEAD)
    copies = pixels / (LOADS_AHEAD * passes)
    part = replace(part, memory=part.memory * copies, wavefronts=part.wavefronts * copies)
    return (cut.counts.part("load") + part * slices) * passes


def _places(cut: Cut, rows: int, pixels: float) -> Counters:
    """Return what a warp's share of the places of pixels takes to set (set_places), of `pixels` in a row."""
    of_row = cut.counts.part("places.row") + cut.counts.part("places") * _ceil(pixels, WARP)
    return of_row * _ceil(rows, cut.warps)


@functools.cache
def _rows_made(
    first: int, end: int, height: int, before: int, kernel: int, stride: int, group_rows: int
) -> tuple[int, ...]:
    """Return how often the threads of a block go over the strips of a group of rows, for each group of a band.

    Args:
        first, end: rows of the result.
        before: rows of padding above.
    """
    top = max(0, first * stride - before)
    bottom = min((end - 1) * stride - before + kernel, height)
    made, passes = first, []
    for read in (*range(top + group_rows, bottom, group_rows), bottom):
        possible = end if read == bottom else max(made, (read + before - kernel) // stride + 1)
        passes.append(_ceil(possible - made, group_rows // stride))
        made = possible
    return tuple(passes)


def _expand_depthwise(cut: Cut, call: RecordedCall, copy: Counters | None = None) -> Work:
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

    def under(first: int, end: int, before: int, most: int) -> int:
        """Return the rows or columns of x under some of y."""
        return min(most, (end - 1) * stride - before + kernel) - max(0, first * stride - before)

    bands = [(first, min(first + cut["band_rows"], out_height)) for first in range(0, out_height, cut["band_rows"])]
    columns = [(first, min(first + cut["columns"], out_width)) for first in range(0, out_width, cut["columns"])]
    rows = sum(under(*band, padding[0], height) for band in bands) / len(bands)
    groups = sum(_ceil(under(*band, padding[0], height), group_rows) for band in bands) / len(bands)
    made = sum(sum(_rows_made(*band, height, padding[0], kernel, stride, group_rows)) for band in bands) / len(bands)
    pixels = sum(under(*one, padding[2], in_width) for one in columns) / tiles  # of a row
    # A warp multiplies one fragment of 16 pixels at a time, or two.
    name, unit = ("pair", 32) if cut["pairs"] else ("fragment", 16)
    fragments = _ceil(rows / groups * pixels, unit)
    of_row = sum(_ceil(end - first, cut["strip"]) for first, end in columns) / tiles
    strips = of_row * out_height / len(bands)
    rounds = made * _ceil(of_row * (group_rows // stride), lanes)
    taps_inside = sum(
        0 <= row * stride - padding[0] + tap < height for row in range(out_height) for tap in range(kernel)
    )

    if copy is None:
        fragment = _with_activation(cut, name, call.arguments["expand_activation"])
        fragment = fragment + part(f"{name}.slice") * (inner / (64 / size))
    else:
        fragment = copy * (unit * inner / 8 / WARP)
    strip = _with_activation(cut, "strip", call.arguments["activation"]) + part("row") * (taps_inside / out_height - 1)
    # Of a thread in a group, and once for a block: a pixel and a row of weights has as many threads as a slice chunks.
    chunks = _ceil(inner, 16) * 2
    share, of_share = min(chunks, 4), _ceil(chunks, 4)
    load = _load(cut, of_share, fragments * unit * share / cut.threads)
    weights = (part("weights") + part("weights.chunk") * of_share) * _ceil(width * share, cut.threads)
    padding = _ceil((kernel - 1) * width * size / 16, WARP)
    zeros = (part("zero.row") + part("zero") * padding) * _ceil(cut["ring_rows"], cut.warps)
    taps = kernel * kernel * width * size / 16 / (TAP_VECTORS * cut.threads)
    load_taps = replace(part("taps") * taps, trips=float(_ceil(taps, 1))) + _scale_taps(cut, kernel, width)
    places = _places(cut, group_rows, pixels)
    first = total(((part("prologue"), 1), (weights, copy is None), (load, 1), (places, 1), (zeros, 1)))
    warps_of_strips = strips * (width * size / 16) / WARP
    group = (part("group") + load) * cut.warps + fragment * fragments
    of_image = group * groups + strip * warps_of_strips
    of_image = of_image + part("image") * cut.warps + part("lane") * (lanes * _ceil(width, WARP))
    images = batch / _ceil(batch, cut["images"])
    issued = ((first + load_taps) * cut.warps + of_image * images) * cut.grid
    chain = (part("group") + load + fragment * _ceil(fragments, cut.warps)) * groups + strip * rounds
    # The rows of x of a group are asked for while the strips of the one before it are computed.
    body = _chain((chain + part("image") + part("lane") * lanes) * images, inputs=1)
    excites = call.arguments.get("w_reduce") is not None
    reduced = call.arguments["w_reduce"].shape[0] if excites else 0
    more, in_body, last = _arrival_tail(cut, reduced, channels, width, size)
    prologue = _chain(first) + _chain(load_taps, parameters=load_taps.trips)
    # Without expansion the groups of channels share those of x.
    read = inner if copy is None else channels / cut["channel_groups"]
    l2_bytes = cut.grid * (images * rows * pixels + (width if copy is None else 0)) * read * size
    l2_bytes += call.results[0].numel() * size
    return Work(issued + more, cut.counts.registers, l2_bytes, prologue, body + in_body, last)


def _mbconv_queue(cut: Cut, call: RecordedCall) -> Work:
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
    first = _expand_depthwise(expand, replace(call, results=[between]), copy)
    second = _pointwise(project, replace(call, arguments={**given_project, "activation": "identity"}))
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
    start_of_project = drawn + second.prologue - _chain(_product_fill(project, gated=gate is not None)[1])
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


def _mbconv(cut: Cut, call: RecordedCall) -> Work:
    """Follow the walk of csrc/cuda/mbconv.cuh. What passes between the blocks of a cluster counts as bytes of L2, and
    a wait for it, or for all of them, as one for L2."""
    part, team, groups, passes = cut.counts.part, cut["team"], cut["groups"], cut["passes"]
    cluster = cut["cluster"]  # in a stack there may be more blocks than the team: they add their share of y alone
    given, size = call.arguments, call.dtype.itemsize
    batch, inner, height, width = (int(side) for side in given["x"].shape)
    _, outer, out_height, out_width = (int(side) for side in call.results[0].shape)
    kernel, stride, padding = int(given["weight"].shape[2]), int(given["stride"]), given["padding"]
    pixels, out_pixels, lanes = height * width, out_height * out_width, cut["lanes"]
    name, unit = ("pair", 32) if pixels > 64 else ("fragment", 16)
    fragments, strips = _ceil(pixels, unit), _ceil(out_width, cut["strip"]) * out_height
    taps_inside = sum(
        0 <= row * stride - padding[0] + tap < height for row in range(out_height) for tap in range(kernel)
    )
    fragment = _with_activation(cut, name, given["expand_activation"]) + part(f"{name}.slice") * cut["slices"]
    strip = _with_activation(cut, "strip", given["activation"]) + part("row") * (taps_inside / out_height - 1)
    excites = given["w_reduce"] is not None
    lane = part("lane") * (lanes * excites)

    # What a block copies, of a thread: rows of `slices` or of the block's channels, four chunks each at a time.
    share, held_slices = min(_ceil(inner, 16) * 2, 4), _ceil(groups * _EXPANDED * size, 64)
    columns = _ceil(cut["pass_columns"], WARP) * WARP
    load = _load(cut, cut["slices"], fragments * unit * share / cut.threads)
    expand_rows, project_rows = (_ceil(rows * 4, cut.threads) for rows in (_EXPANDED, columns))
    weights = (part("weights") + part("weights.chunk") * cut["slices"]) * expand_rows
    project = (part("project") + part("project.chunk") * held_slices) * _ceil(project_rows, 2)  # two rows at a time
    lane_sums = (lanes + groups) * _EXPANDED * 4
    cleared = lane_sums + held_slices * (cut["held_pixels"] + 1) * 64 + height * cut["ring_row_bytes"]
    # The first norms and taps of a thread are asked for before weights or x, which takes longer than they do.
    norms = _ceil(2 * _ceil(groups * _EXPANDED, WARP) + _ceil(outer, WARP), cut.warps)
    taps = _ceil(kernel * kernel * groups * _EXPANDED * size / 16, cut.threads)
    scale = part("scale") * _ceil(groups * kernel * kernel, cut.threads // (_EXPANDED // 4))
    parameters = total(((part("norm"), norms), (replace(part("taps"), trips=0.0), taps), (scale, 1)))
    parameters = replace(parameters, trips=float(max(0, norms - 2) + _ceil(taps, TAP_VECTORS) - 1))
    first = total(
        (
            (part("prologue"), 1),
            (weights, cut["weight_slots"]),
            (load, 1),
            (project, 1),
            (_places(cut, height, width), 1),
            (part("zero"), _ceil(cleared / 16, cut.threads)),
        )
    )

    tiles = cut["held_pixels"] // WARP * (columns // WARP)
    tile = part("tile") + part("tile.slice") * held_slices
    vectors = out_pixels * cut["pass_columns"] / 8
    add = part("add") + part("add.other") * team
    # Of all warps of a block; every thread of a warp that has any work issues along.
    of_group = (part("group") + load * (1 / groups)) * cut.warps + fragment * fragments
    of_group = of_group + strip * (strips * (_EXPANDED * size / 16) / WARP) + lane * _ceil(_EXPANDED, WARP)
    of_pass = part("pass") * cut.warps + tile * tiles + add * (vectors / WARP / team)
    of_image = of_group * groups + of_pass * passes + part("image") * cut.warps
    chain = (part("group") + fragment * _ceil(fragments, cut.warps) + strip * _ceil(strips, lanes) + lane) * groups
    adds = _ceil(vectors, cluster * cut.threads)
    chain = chain + (part("pass") + tile * _ceil(tiles, cut.warps) + add * adds) * passes + part("image")
    waits = passes * (2 + adds * _ceil(team, RANKS_AHEAD))
    body = _chain(chain, inputs=1, parameters=waits)
    if excites:
        reduced, own = given["w_reduce"].shape[0], groups * _EXPANDED
        product, of_product = _gate_products(cut, 1, reduced, own, size)
        expand, of_expand = _expand_product(cut, 1, reduced, own, size)
        hidden = (part("hidden") + part("hidden.other") * team) * _ceil(reduced, cut.threads)
        of_image = of_image + product + expand + hidden * _ceil(reduced, WARP)
        body = body + of_product + of_expand + _chain(hidden, parameters=1 + _ceil(team, HIDDEN_RANKS_AHEAD))
    images = batch / _ceil(batch, cut["images"])
    issued = ((first + parameters) * cut.warps + of_image * images) * (cut.grid * team / cluster)
    prologue = _chain(first) + _chain(parameters, parameters=parameters.trips)
    of_weights = (inner * groups * _EXPANDED + groups * _EXPANDED * outer) * size
    between = 4 * team * out_pixels * outer
    l2_bytes = cut.grid * team / cluster * (images * pixels * inner * size + of_weights) + batch * (
        between + out_pixels * outer * size
    )
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body * images, Clocks())


def _arrival_tail(
    cut: Cut, reduced: int, channels: int, block_channels: int, size: int
) -> tuple[Counters, Clocks, Clocks]:
    """Means and gate by last arrival: issued by all, in the body of each block, and after the last one."""
    part, images, groups, tiles = cut.counts.part, cut["images"], cut["channel_groups"], cut["tiles"]
    units = cut.grid // max(1, groups * tiles)
    issued = part("finish") * (cut.grid * cut.warps)
    means = Clocks(part("finish").issued)
    if tiles > 1:
        # Threads that have no channel of their own share the tiles.
        shared = _ceil(tiles, max(1, cut.threads // block_channels))
        issued = issued + part("tile") * (units * groups * cut.warps * shared)
        means = means + Clocks(part("tile").issued * shared, 0, _ceil(shared, TILES_AHEAD), 1)
    if not reduced:
        return issued, Clocks(), means
    product, chain = _gate_products(cut, images, reduced, min(block_channels, channels), size)
    expand, gate = _expand_product(cut, images, reduced, channels, size)
    issued = issued + product * (units * groups) + expand * units
    sums = _ceil(images * reduced, cut.threads)
    hidden = Clocks(0, 0, sums * _ceil(groups, HIDDEN_AHEAD) + sums, 1)
    if tiles > 1:
        return issued, Clocks(), means + chain + hidden + gate
    return issued, means + chain, hidden + gate


def _resident_tail(
    cut: Cut, reduced: int, channels: int, block_channels: int, size: int
) -> tuple[Counters, Clocks, Clocks]:
    """Return the gate by a team of resident blocks: each of them does its share, and waits twice for the others."""
    own = min(cut["slabs"] * block_channels, channels)
    product, chain = _gate_products(cut, 1, reduced, own, size)
    expand, gate = _expand_product(cut, 1, reduced, own, size)
    issued = (product + expand) * cut.grid + cut.counts.part("finish") * (cut.grid * cut.warps)
    exchange = Clocks(cut.counts.part("finish").issued, 0, _ceil(reduced, cut.threads) * cut["team"] / 4 + 1, 2)
    return issued, chain + exchange + gate, Clocks()


def _product_fill(cut: Cut, *, gated: bool) -> tuple[int, Counters]:
    """Return the vectors of gates that a thread copies after the first, and what asks for the first stages of x."""
    part, slices = cut.counts.part, min(3, cut["steps"])
    gates = _ceil(cut["gate_images"] * 4, cut.threads) - 1 if gated else 0
    return gates, part("fill") * slices + part("gate") * (slices * gates)


def _pointwise(cut: Cut, call: RecordedCall) -> Work:
    part = cut.counts.part
    x, weight, size = call.arguments["x"], call.arguments["weight"], call.dtype.itemsize
    pixels, inner, outer = x.shape[0] * x.shape[2] * x.shape[3], x.shape[1], weight.shape[0]
    rows, columns, steps, vector = cut["rows"], cut["columns"], cut["steps"], 16 // size
    gated, residual = (call.arguments.get(name) is not None for name in ("gate", "residual"))
    pools = cut.kernel == "pointwise_pool"
    keeps_weight, shares = cut["keeps_weight"] == 1, cut["parts"] > 1 and not pools
    step = part("step.gated" if gated else "step")
    if not keeps_weight:
        step = step + part("step.weights")
    # Values of a tile go through shared memory, four or more to a thread, or leave from the registers with the tile.
    values = rows * columns
    of_value = part("value.part") if shares else _with_activation(cut, "value", call.arguments["activation"])
    of_thread = values / min(cut.threads, values / 4)
    tile = total(((part("tile"), 1), (part("tile.gate"), gated), (part("tile.residual"), residual)))
    gates, fill = _product_fill(cut, gated=gated)
    residuals = rows * columns / vector / cut.threads if residual else 0.0
    load = total(((part("prologue"), 1), (part("weights"), min(3, steps)), (fill, 1)))
    one = total(((step, steps), (part("gate"), steps * gates), (tile, 1), (part("residual"), residuals)))
    tiles = cut["row_tiles"] * cut["column_tiles"] * cut["parts"]
    issued = load * (cut.grid * cut.warps) + (one * cut.warps + of_value * (values / WARP)) * tiles
    prologue = _chain(load, parameters=part("prologue").trips)
    # Later slices are asked for three steps before they are needed.
    body = _chain((one + of_value * of_thread) * cut["tiles"], inputs=1)
    last = Clocks()
    y_bytes = call.results[0].numel() * size
    l2_bytes = size * pixels * inner * cut["column_tiles"] + y_bytes * (2 if residual else 1)
    readers = cut.grid / cut["column_tiles"] if keeps_weight else cut["row_tiles"] * cut["parts"]
    l2_bytes += size * outer * inner / (1 if pools else cut["parts"]) * readers
    if pools:
        per_warp, of_block = _pooling(cut, x.shape[2] * x.shape[3], size)
        issued = issued + (per_warp * tiles + of_block * cut.grid) * cut.warps
        body = body + _chain(per_warp * cut["tiles"] + of_block)
    if cut["parts"] > 1:
        if pools:
            last = Clocks(0, 0, _ceil(cut["parts"], 4), 1)
        else:
            sums = _with_activation(cut, "value", call.arguments["activation"]) + part("value.other") * cut["parts"]
            issued = issued + sums * (values / WARP * tiles / cut["parts"])
            last = _chain(sums * of_thread, parameters=_ceil(cut["parts"], 2)) + Clocks(arrivals=1)
        l2_bytes += 2 * 4 * cut["parts"] * call.results[0].numel()
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, last)


def _pooling(cut: Cut, pixels: int, size: int) -> tuple[Counters, Counters]:
    """Return what pooling adds to a warp in a tile, and to it in a block.

    A warp adds up all its rows of an image at once, or 8 of them where the sums go through shared memory.
    """
    part = cut.counts.part
    means = part("mean") * _ceil(cut["images"] * cut["columns"], cut.threads)
    if cut["epilogue"] != _ANY_EPILOGUE:
        return part("image") * (1 + (cut["warp_rows"] - 1) / pixels), means
    width = 8 if size == 2 and cut["columns"] > 16 else 4
    vectors = cut["rows"] * cut["columns"] / width / cut.threads
    return part("image") * (1 + 7 / pixels) * vectors, means


def _stem(cut: Cut, call: RecordedCall) -> Work:
    part, size = cut.counts.part, call.dtype.itemsize
    x, warps, channels = call.arguments["x"], cut["warps"], cut["padded_channels"]
    groups, of_block = channels // WARP, min(cut["tiles"], cut["tiles_per_block"])
    weights = _ceil(cut["weight_bytes"] / size, cut.threads)
    units = _ceil(cut["window_height"] * cut["window_width"] / (16 / size), cut.threads) if size == 4 else 0
    load = total(((part("prologue"), 1), (part("weights"), weights)))
    tile = total(((part("tile"), 1), (part("channels"), groups - 1), (part("unit"), units)))
    issued = (load * cut.grid + tile * cut["tiles"]) * warps + part("norm") * (cut.grid * groups)
    prologue = _chain(load, parameters=part("weights").trips) + _chain(part("norm"), parameters=part("norm").trips)
    body = _chain(tile * of_block, inputs=of_block if size == 4 else 1)
    window = x.shape[1] * cut["window_height"] * cut["window_width"] * size
    l2_bytes = cut["tiles"] * window + cut.grid * cut["weight_bytes"] + call.results[0].numel() * size
    return Work(issued, cut.counts.registers, l2_bytes, prologue, body, Clocks())


def _vectors(cut: Cut, call: RecordedCall, of_vector: Counters, reads: int) -> Work:
    """Return a pass over the result."""
    part, size = cut.counts.part, call.dtype.itemsize
    elements = call.results[0].numel()
    passes = elements / (16 // size) / (cut.grid * cut.threads)
    issued = (part("prologue") + part("norm") + of_vector * passes) * (cut.grid * cut.warps)
    prologue = _chain(part("prologue")) + _chain(part("norm"), parameters=part("norm").trips)
    body = _chain(of_vector, inputs=1) * max(1.0, passes)
    return Work(issued, cut.counts.registers, reads * elements * size, prologue, body, Clocks())


def _norm_act(cut: Cut, call: RecordedCall) -> Work:
    return _vectors(cut, call, _with_activation(cut, "vector", call.arguments["activation"]), 2)


def _scale(cut: Cut, call: RecordedCall) -> Work:
    return _vectors(cut, call, cut.counts.part("vector"), 2)


def _excite(cut: Cut, call: RecordedCall) -> Work:
    part, size = cut.counts.part, call.dtype.itemsize
    (batch, channels), reduced = call.arguments["pooled"].shape, call.arguments["w_reduce"].shape[0]
    images = min(cut["images"], batch)
    product, reduce = _gate_products(cut, images, reduced, channels, size)
    expand, gate = _expand_product(cut, images, reduced, cut["split_channels"], size)
    issued = (product + expand + part("finish") * cut.warps) * cut.grid
    body = replace(reduce, inputs=1.0) + gate + Clocks(0, 0, 1)
    weights = reduced * (channels + cut["split_channels"]) * size
    return Work(issued, cut.counts.registers, cut.grid * weights, _chain(part("finish")), body, Clocks())


_FAMILIES: Mapping[str, Callable[[Cut, RecordedCall], Work]] = {
    "depthwise_strips": _depthwise,
    "depthwise_resident": _depthwise,
    "pointwise": _pointwise,
    "pointwise_pool": _pointwise,
    "expand_depthwise": _expand_depthwise,
    "mbconv": _mbconv,
    "mbconv_queue": _mbconv_queue,
    "mbconv_stack": _mbconv,  # a block of it
    "conv_stem": _stem,
    "norm_act": _norm_act,
    "scale_by_gate": _scale,
    "squeeze_excite_gate": _excite,
}

"""Instructions of a warp in each part of the kernels whose launches are estimated: `effkernels.plan.kernel_counts`.

Parts are found by what they do: the loop over rows of a depthwise strip has the multiply-adds of K taps, the main loop
of a product has the tensor instructions. `effkernels.plan.time_estimate` says how often each part runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.kernel_economy.loops import (
    Flow,
    Instruction,
    Loop,
    PartMissing,
    innermost,
    inside,
    instructions_of,
    loops_of,
    only,
    outermost,
)
from benchmarks.kernel_economy.paths import Score, around, counters, longest, plain, way, with_norm
from benchmarks.kernel_economy.pointwise import pointwise_parts
from benchmarks.kernel_economy.reading import Kernel
from effkernels.plan.kernel_counts import (
    EXPAND_AHEAD,
    HIDDEN_AHEAD,
    LOADS_AHEAD,
    TAP_VECTORS,
    TILES_AHEAD,
    Counters,
    KernelCounts,
    reduce_lanes,
)

Parts = dict[str, Counters]

# kProjectedTiles of mbconv.h: columns of 8 output channels in a tile.
PROJECTED_COLUMNS = (12, 14)


def strip(kernel: Kernel) -> int:
    """Return the output pixels of a depthwise thread."""
    return int(kernel.arguments[3])


def strip_elements(kernel: Kernel) -> int:
    """Return the elements of the result in a depthwise thread's strip."""
    return strip(kernel) * 16 // kernel.element_bytes


def norm_of_channel(flow: Flow, loop: Loop) -> Counters:
    """Count the scale and shift of a channel, whose parameters are asked for together (`stored_norm` in numeric.cuh):
    one wait.
    """
    return replace(around(flow, loop, (), with_norm), trips=1.0)


def _is(loop: Loop, **wanted: int) -> bool:
    return all(loop.count(name) == times for name, times in wanted.items())


def _taps(kernel: Kernel, loops: Iterable[Loop]) -> Loop:
    """Return the loop over TAP_VECTORS vectors of taps of a thread, in the type of the images (copy_taps): the last of
    two in float32, whose weights have one type."""
    stores = 16 // kernel.element_bytes * TAP_VECTORS
    found = [one for one in loops if _is(one, LDG=TAP_VECTORS, STS=stores)]
    if not found:
        raise PartMissing("no loop over vectors of taps")
    return max(found, key=lambda one: one.first)


def gate_parts(kernel: Kernel, flow: Flow, loops: Sequence[Loop], images: int = 4) -> Parts:
    """Return the two products of squeeze-and-excitation: a pass over one vector of weights ("reduce", "expand.8": 8 at
    a time), without images and for each image, and what is around these loops for a row or channel, likewise.

    The loop of the first product holds 4 vectors of weights, that of the second EXPAND_AHEAD.

    Args:
        images: whose products are in the code, one after the other.
    """
    size = kernel.element_bytes
    parts: Parts = {}

    def add(name: str, code: Loop, left_out: Sequence[Loop], marker: str, passes: int) -> None:
        def most(one: Instruction) -> tuple[float, ...]:
            return float(one.opcode.startswith(marker)), needed * float(one.name == "LDG"), -1.0

        def least(one: Instruction) -> tuple[float, ...]:
            return -float(one.opcode.startswith(marker)), needed * float(one.name == "LDG"), -1.0

        needed = 1.0 if marker == "FFMA" else -1.0  # the loads of weights; not those of what a long vector leaves over
        all_images, none = around(flow, code, left_out, most), around(flow, code, left_out, least)
        parts[name] = none * (1 / passes)
        of_image = (all_images - none) * (1 / passes / images)
        parts[f"{name}.image"] = replace(of_image, trips=0.0)

    each = 16 // size
    found = [one for one in innermost(loops) if _is(one, FFMA=4 * each * images) and _wide(one, 16)]
    reduce = only(found, "over a row of w_reduce")
    outer = [one for one in loops if inside(reduce, one) and one.count("SHFL")]
    add("reduce", reduce, (), "FFMA", 4)
    rows = only(outer, "over the rows of w_reduce")
    # Two rows in the code, one after the other, for each of the two loops over them.
    shuffles = {4: 2, 16: 4}[reduce_lanes(kernel.family)]
    add("reduce.row", rows, [reduce], "SHFL", max(1, rows.count("SHFL") // (2 * shuffles * images)))
    for width in dict.fromkeys((each, 4, 2, 1)):
        found = [
            one
            for one in innermost(loops)
            if _is(one, FFMA=EXPAND_AHEAD * width * images, LDG=EXPAND_AHEAD, SHFL=0) and _wide(one, width * size)
        ]
        expand = only(found, f"over a row of w_expand, {width} at a time")
        outer = [one for one in loops if inside(expand, one) and one.count("MUFU")]
        add(f"expand.{width}", expand, (), "FFMA", EXPAND_AHEAD)
        add(f"expand.{width}.channel", only(outer, "over the channels of w_expand"), [expand], "MUFU.RCP", 1)
    return parts


def _wide(loop: Loop, width: int) -> bool:
    """Return whether every load of global memory in a loop has this width in bytes."""
    names = {16: {"128"}, 8: {"64"}, 4: set(), 2: {"U16"}}[width]
    others = {"128", "64", "U16", "S16", "U8"} - names
    loads = [set(one.opcode.split(".")) for one in loop.instructions if one.name == "LDG"]
    return all(names <= words and not (others & words) for words in loads)


def depthwise_parts(kernel: Kernel, flow: Flow) -> Parts:
    """Count a kernel on strips of pixels: prologue, rows of taps, strips, images, and what comes after them."""
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    loops = loops_of(flow)
    vector = 16 // kernel.element_bytes
    products, inputs = size * strip(kernel) * vector, (strip(kernel) - 1) * stride + size
    by_first = {one.first: one for one in loops if _is(one, FFMA=products, LDG=inputs, MUFU=0)}
    rows = list(by_first.values())
    short = strip(kernel) == 2  # its window is in registers, its rows one after the other in the code of a strip
    if len(rows) != (0 if short else 2):
        raise PartMissing(f"{len(rows)} loops over rows of inputs; wanted: {0 if short else 2}")
    around_rows = [one for one in loops if all(inside(row, one) for row in rows)]
    if short:
        around_rows = [one for one in loops if one.count("FFMA") >= size * products and one.count("STG") == 2]
    strips = only(around_rows, "over strips")
    images = only([one for one in loops if inside(strips, one) and one.count("BAR")], "over images or slabs")
    parts = {"strip": around(flow, strips, rows), "strip.plain": around(flow, strips, rows, plain)}
    if rows:
        parts["row"], parts["row.border"] = sorted((around(flow, row) for row in rows), key=lambda row: row.issued)
    resident = kernel.family == "depthwise_resident"
    before = [one for one in loops if (inside(one, images) if resident else True) and one.last < strips.first]
    parts["taps"] = around(flow, _taps(kernel, before))  # the norm of a channel is in the prologue
    parts.update(_scale_part(kernel, flow, before))
    lanes = [one for one in loops if one.first > strips.last and inside(one, images) and one.count("LDS")]
    sums = only(lanes, "over the lanes' sums")
    parts["lane"] = around(flow, sums) * (1 / sums.count("LDS"))
    hidden = [*before, strips, *lanes]
    if resident:
        parts["slab"] = around(flow, images, hidden, with_norm)
        parts["prologue"] = counters(way(flow, 0, images.first, longest, ends=False))
    else:
        parts["image"] = around(flow, images, hidden)
        parts["prologue"] = counters(way(flow, 0, images.first, with_norm, before, ends=False))
    after = [one for one in loops if one.first > images.last]
    called = _called(flow, images.last, min((one.first for one in after), default=0))
    parts["finish"] = counters(way(flow, called, None, longest, [*hidden, *outermost(after)]))
    tiles = [one for one in innermost(after) if one.count("LDG") == TILES_AHEAD and not one.count("FFMA")]
    if tiles:
        parts["tile"] = around(flow, tiles[0]) * (1 / TILES_AHEAD)
    if not resident:
        parts.update(_hidden_parts(flow, after))
    stores = [one for one in after if one.count("STG") and one.count("LDS") and one.count("FMUL")]
    if resident and stores:
        inner = innermost(stores)[0]
        parts["write"] = around(flow, inner) * (1 / inner.count("STG"))
    parts.update(gate_parts(kernel, flow, after, 1 if resident else 4))
    return parts


def _hidden_parts(flow: Flow, after: Sequence[Loop]) -> Parts:
    """Return what adds the product of one block to a hidden value, and to four of them, and a share of blocks to their
    sum (add_hidden)."""
    found = [one for one in innermost(after) if one.count("LDG") == HIDDEN_AHEAD and not one.count("FFMA")]
    wide = [any(i.opcode.startswith("LDG") and "128" in i.opcode for i in one.instructions) for one in found]
    parts = {}
    for name, of in (("hidden", False), ("hidden.4", True)):
        one = only(
            [loop for loop, is_wide in zip(found, wide, strict=True) if is_wide == of], "over blocks' hidden values"
        )
        parts[name] = around(flow, one) * (1 / HIDDEN_AHEAD)
    shares = [one for one in innermost(after) if one.count("LDS") and not (one.count("LDG") or one.count("STS"))]
    share = _first([one for one in shares if one.count("FADD") == one.count("LDS")], "over shares of blocks")
    parts["hidden.share"] = around(flow, share) * (1 / share.count("LDS"))
    return parts


def _scale_part(kernel: Kernel, flow: Flow, before: Sequence[Loop]) -> Parts:
    """Return what multiplies four channels of a tap by their scales (scale_taps); float32 kernels do not."""
    if kernel.element_bytes == 4:
        return {}
    scales = [one for one in before if one.count("FMUL") and one.count("LDS") and one.count("STS") == 1]
    return {"scale": around(flow, only(innermost(scales), "over taps that are scaled"))}


def _around(inner: Loop, loops: Sequence[Loop]) -> list[Loop]:
    """Return the loops that a loop is in, the shortest first."""
    return [one for one in loops if inside(inner, one)]


def _clears(loop: Loop) -> bool:
    """Return whether a loop stores 16 bytes of shared memory, and reads nothing."""
    stores = [one for one in loop.instructions if one.opcode.startswith("STS.128")]
    return bool(stores) and not any(loop.count(name) for name in ("LDG", "LDS", "LDGSTS"))


def _places_parts(flow: Flow, before: Sequence[Loop]) -> Parts:
    """Return what sets the places of a warp's pixels (set_places): 32 of them, and what is around them for a row."""
    places = [one for one in before if any(i.opcode.startswith("STS.U16") for i in one.instructions)]
    pixels = only(places, "over places of pixels")
    rows = only(_around(pixels, places), "over rows of places")
    return {"places": around(flow, pixels), "places.row": around(flow, rows, [pixels])}


def _load_parts(flow: Flow, passes: Loop, slices: Loop) -> Parts:
    """Return what loads rows of x (expand_rows.cuh): a pass over LOADS_AHEAD pixels of a thread, where rows are whole,
    and 16 bytes of each of them."""
    copies = around(flow, slices) * (LOADS_AHEAD / slices.count("LDGSTS"))
    return {"load": around(flow, passes, [slices], plain), "load.pixels": copies}


def expand_depthwise_parts(kernel: Kernel, flow: Flow) -> Parts:
    """Count the walk of expand_depthwise.cuh: prologue, images, groups of rows, and the loops in a group."""
    size, pixels, vector = int(kernel.arguments[1]), strip(kernel), 16 // kernel.element_bytes
    loops = loops_of(flow)
    groups = only([one for one in loops if one.count("BAR") == 2 and one.count("HMMA")], "over groups of rows")
    images = only([one for one in loops if inside(groups, one)], "over images")
    in_group = [one for one in loops if inside(one, groups)]
    slices = sorted((one for one in innermost(in_group) if one.count("HMMA")), key=lambda one: one.count("HMMA"))
    if len(slices) != 2:
        raise PartMissing(f"{len(slices)} loops over slices of input channels; wanted: 2, of one fragment and of two")
    single, pair = (only([one for one in in_group if inside(k, one)], "over fragments of pixels") for k in slices)
    rows = only([one for one in in_group if _is(one, FFMA=size * pixels * vector, MUFU=0)], "over rows of taps")
    strips = only([one for one in in_group if inside(rows, one) and one.count("STG") == pixels], "over strips")
    chunks = only([one for one in innermost(in_group) if one.count("LDGSTS")], "over slices of x")
    loads = only([one for one in in_group if inside(chunks, one)], "over pixels of x")
    before = [one for one in loops if one.last < images.first]
    weight = only([one for one in innermost(before) if one.count("LDGSTS") == 1], "over slices of a row of weights")
    weights = only(_around(weight, before), "over rows of weights")
    ring = only([one for one in innermost(before) if _clears(one) and _around(one, before)], "over columns of padding")
    of_image = [one for one in loops if inside(one, images) and one.first > groups.last]
    sums = only([one for one in of_image if one.count("LDS")], "over the lanes' sums")
    after = [one for one in loops if one.first > images.last]
    called = _called(flow, images.last, min((one.first for one in after), default=0))
    tiles = only([one for one in innermost(after) if one.count("LDG") == TILES_AHEAD], "over tiles")
    return {
        "prologue": counters(way(flow, 0, images.first, with_norm, outermost(before), ends=False)),
        "weights": around(flow, weights, [weight]),
        "weights.chunk": around(flow, weight),
        **_load_parts(flow, loads, chunks),
        "zero": around(flow, ring),
        "zero.row": around(flow, only(_around(ring, before), "over rows of padding"), [ring]),
        **_places_parts(flow, before),
        "taps": around(flow, _taps(kernel, before)),
        **_scale_part(kernel, flow, before),
        "image": around(flow, images, [groups, *of_image]),
        "group": around(flow, groups, outermost(in_group)),
        "fragment": around(flow, single, slices),
        "fragment.plain": around(flow, single, slices, plain),
        "fragment.slice": around(flow, slices[0]),
        "pair": around(flow, pair, slices),
        "pair.plain": around(flow, pair, slices, plain),
        "pair.slice": around(flow, slices[1]),
        "strip": around(flow, strips, [rows]),
        "strip.plain": around(flow, strips, [rows], plain),
        "row": around(flow, rows),
        "lane": around(flow, sums) * (1 / sums.count("LDS")),
        "finish": counters(way(flow, called, None, longest, outermost(after))),
        "tile": around(flow, tiles) * (1 / TILES_AHEAD),
        **_hidden_parts(flow, after),
        **gate_parts(kernel, flow, after),  # of mbconv_queue, whose items are these blocks
    }


def mbconv_queue_parts(flow: Flow) -> Parts:
    """Count what a block of mbconv_queue does beside its item, which is a block of another kernel: it looks for it; and
    copies pixels where the block of the network has no expansion, which no other kernel does."""
    loops = sorted(loops_of(flow), key=lambda one: one.first)
    find, search = loops[:2]
    # For every vector its place and itself are read; one loop for each stride, which are alike.
    copies = [
        one for one in innermost(loops) if one.count("STS") and _is(one, LDS=2 * one.count("STS"), FADD=0, FMUL=0)
    ]
    if not copies:
        raise PartMissing("no loop over the pixels of a block without expansion")
    return {
        "draw": counters(way(flow, 0, search.first, longest, (find,), ends=False)),
        "find": around(flow, find),
        "search": around(flow, search),
        "copy": around(flow, copies[0]) * (1 / copies[0].count("STS")),
    }


def _no_norm(one: Instruction) -> tuple[float, ...]:
    """Score for the way of a warp that takes no norm, whose values are read one by one."""
    return -float(one.opcode == "MUFU.RSQ"), -float(one.name == "LDG" and not one.opcode.endswith("128")), 1.0


def _reads_taps(loop: Loop) -> bool:
    """Return whether a loop reads taps as they are stored (depthwise_product.cuh)."""
    return any(one.opcode.startswith("LDS.U16") for one in loop.instructions)


def mbconv_parts(kernel: Kernel, flow: Flow) -> Parts:
    """Count the walk of mbconv.cuh: prologue, images, groups of channels, the gate, passes over output channels."""
    loops = loops_of(flow)
    # Ways back from code after the function's end look like loops over what follows the groups.
    images = _first([one for one in outermost(loops) if one.count("HMMA")], "over images")
    in_image = [one for one in loops if inside(one, images)]
    before = [one for one in loops if one.last < images.first]
    found = [one for one in in_image if one.count("HMMA") and one.count("LDGSTS") and one.count("MUFU") > 1]
    groups = _first(found, "over groups of channels")
    in_group = [one for one in in_image if inside(one, groups)]
    products = [one for one in innermost(in_group) if one.count("HMMA")]
    rows = only([one for one in products if _reads_taps(one)], "over rows of taps")
    slices = sorted((one for one in products if one is not rows), key=lambda one: one.count("HMMA"))
    if len(slices) != 2:
        raise PartMissing(f"{len(slices)} loops over slices of input channels; wanted: 2, of one fragment and of two")
    single, pair = (only([one for one in in_group if inside(k, one)], "over fragments of pixels") for k in slices)
    windows = only([one for one in in_group if inside(rows, one)], "over pairs of parts")
    sums = only([one for one in innermost(in_group) if one.first > windows.last], "over the lanes' sums")
    passes = only(
        [one for one in in_image if one.first > groups.last and one.count("HMMA") and one.count("STG")],
        "over passes",
    )
    in_pass = [one for one in in_image if inside(one, passes)]
    steps = sorted((one for one in innermost(in_pass) if one.count("HMMA")), key=lambda one: one.count("HMMA"))
    if len(steps) != 2:
        raise PartMissing(f"{len(steps)} loops over slices of gated channels; wanted: 2, of each tile")
    tiles = [
        max((one for one in in_pass if inside(step, one)), key=lambda one: len(one.instructions)) for step in steps
    ]
    add = only([one for one in in_pass if one.count("STG")], "over vectors of y")
    ranks = only([one for one in innermost(in_pass) if inside(one, add)], "over the ranks' sums of y")
    hidden = only(
        [one for one in innermost(in_image) if groups.last < one.first < passes.first and one.count("LD")],
        "over the ranks' hidden values",
    )
    of_hidden = only([one for one in in_image if inside(hidden, one)], "over hidden values")
    copies = [one for one in innermost(before) if one.count("LDGSTS") and not one.count("LDG")]
    copies.sort(key=lambda one: one.first)
    nested = [one for one in copies if _around(one, before)]
    in_rows = [one for one in nested if one.count("LDGSTS") == 1]
    vectors = [one for one in copies if one not in nested]
    if (len(in_rows), len(vectors)) != (2, 2):
        raise PartMissing(
            f"{len(in_rows)} and {len(vectors)} loops that copy parameters; wanted: 2 over rows, 2 others"
        )
    chunks = [in_rows[0], only([one for one in nested if one.count("LDGSTS") == 2], "over slices of weights")]
    weights = [only(_around(k, before), "over rows of weights") for k in chunks]
    of_x = [
        one for one in innermost(in_group) if one.count("LDGSTS") and not one.count("LDG") and _around(one, in_group)
    ]
    of_x = [one for one in of_x if one.count("LDGSTS") in (2, 2 * LOADS_AHEAD)]
    of_few, of_many = (
        only([one for one in of_x if one.count("LDGSTS") == 2 * ahead], f"over slices of x, {ahead} pixels at a time")
        for ahead in (1, LOADS_AHEAD)
    )
    loads, few_loads = (
        only([one for one in in_group if inside(k, one)], "over pixels of x") for k in (of_many, of_few)
    )
    zeros = max((one for one in outermost(before) if _clears(one)), key=lambda one: one.first, default=None)
    copied = [one for one in outermost(before) if 0 < one.count("LDGSTS") <= 2]  # parameters, and not x in two ways
    prologue = [
        counters(_way_through(flow, images.first, one, copied, outermost(before))) for one in (_no_norm, with_norm)
    ]
    if zeros is None:
        raise PartMissing("no loop that clears")
    after = [one for one in in_image if one.first > groups.last]
    without_loads = around(flow, groups, outermost(in_group), _without_loads(groups))
    tile_parts: Parts = {}
    for number, (step, tile) in enumerate(zip(steps, tiles, strict=True)):
        columns = PROJECTED_COLUMNS[number]
        tile_parts |= _by_columns(f"tile.{number}", columns, flow, tile, [step])
        tile_parts |= _by_columns(f"tile.{number}.slice", columns, flow, step)
    return {
        "prologue": prologue[0],
        "weights": around(flow, weights[0], [chunks[0]]),
        "weights.chunk": around(flow, chunks[0]),
        "project": around(flow, weights[1], [one for one in before if inside(one, weights[1])]),
        "project.chunk": around(flow, chunks[1]),
        **_load_parts(flow, loads, of_many),
        "load.few": around(flow, few_loads, [of_few], plain),
        "load.few.pixels": around(flow, of_few) * 0.5,  # of two slices
        "zero": around(flow, zeros),
        **_places_parts(flow, before),
        "norm": replace(prologue[1] - prologue[0], trips=0.0) * (1 / 2),  # two are asked for ahead
        "copy": around(flow, vectors[0]),
        "gate.load": around(flow, in_rows[1]),
        "gate.load.row": around(flow, only(_around(in_rows[1], before), "over rows of w_reduce"), [in_rows[1]]),
        "image": around(flow, images, [groups, *outermost(after)]),
        "group": without_loads,
        "group.load": around(flow, groups, outermost(in_group)) - without_loads,
        "fragment": around(flow, single, slices),
        "fragment.plain": around(flow, single, slices, plain),
        "fragment.slice": around(flow, slices[0]),
        "pair": around(flow, pair, slices),
        "pair.plain": around(flow, pair, slices, plain),
        "pair.slice": around(flow, slices[1]),
        "window": around(flow, windows, [rows]),
        "window.plain": around(flow, windows, [rows], plain),
        "window.row": around(flow, rows),
        "lane": around(flow, sums) * (1 / sums.count("LDS")),
        "hidden": around(flow, of_hidden, [hidden]),
        "hidden.other": around(flow, hidden) * (1 / hidden.count("LD")),
        "pass": around(flow, passes, outermost(in_pass)),
        **tile_parts,
        "add": around(flow, add, [ranks]),
        "add.other": around(flow, ranks) * (2 / ranks.count("LD")),
        **_held_gate_parts(flow, after),
    }


def _held_gate_parts(flow: Flow, loops: Sequence[Loop]) -> Parts:
    """Return the two products of squeeze-and-excitation from shared memory (mbconv_gate.cuh): 8 values of a row of
    w_reduce, 4 of one of w_expand, and what is around them for some rows or channels."""
    parts: Parts = {}
    for name, values in (("reduce", 8), ("expand", 4)):
        found = [one for one in innermost(loops) if _is(one, FFMA=values, LDS=1 + values // 4, LDG=0)]
        inner = only(found, f"over a row of w_{name} in shared memory")
        rows = only([one for one in _around(inner, loops) if one.count("SHFL")], f"over rows of w_{name}")
        parts |= {f"gate.{name}": around(flow, inner), f"gate.{name}.rows": around(flow, rows, [inner])}
    return parts


def _first(loops: Sequence[Loop], words: str) -> Loop:
    """Return the loop that begins first."""
    return only(sorted(loops, key=lambda one: one.first)[:1], words)


def _way_through(
    flow: Flow, last: int, score: Score, loops: Sequence[Loop], left_out: Sequence[Loop]
) -> list[Instruction]:
    """Return the best-scoring path from the beginning to a block that passes through some of the loops that are left
    out: what is copied asynchronously, not the loops for parameters of another type beside them."""
    path, at = [], 0
    for one in sorted(loops, key=lambda loop: loop.first):
        path += way(flow, at, one.first, score, left_out, ends=False)
        at = one.last
    return path + way(flow, at, last, score, left_out, ends=False)


def _without_loads(groups: Loop) -> Score:
    """Return the score for the way of a group after which no weights and no x are asked for: between the expand product
    and the end of what is copied asynchronously."""
    end = min(one.address for one in groups.instructions if one.name == "LDGDEPBAR")
    start = max(one.address for one in groups.instructions if one.name == "BAR" and one.address < end)

    def score(one: Instruction) -> tuple[float, ...]:
        counts = longest(one)
        return tuple(-1.0 for _ in counts) if start < one.address < end else counts

    return score


def _no_columns(one: Instruction) -> tuple[float, ...]:
    """Score for the way without products and without their results, but with all else."""
    return -float(one.name == "HMMA"), -float(one.opcode.startswith("STS.64")), *longest(one)


def _by_columns(name: str, columns: int, flow: Flow, loop: Loop, left_out: Sequence[Loop] = ()) -> Parts:
    """Count what a loop takes without columns of 8 output channels, of which it may have so many, and for each."""
    none = around(flow, loop, left_out, _no_columns)
    return {name: none, f"{name}.columns": (around(flow, loop, left_out) - none) * (1 / columns)}


def _called(flow: Flow, after: int, before: int) -> int:
    """Return the first block of the work after the images: that of a function of its own, or the one that follows."""
    starts = {block[0].address: number for number, block in enumerate(flow.blocks)}
    for block in flow.blocks[after : before + 1]:
        for one in block:
            target = re.search(r"0x([0-9a-f]+)", one.operands) if one.name == "CALL" else None
            if target and after < starts.get(int(target[1], 16), -1) <= before:
                return starts[int(target[1], 16)]
    return after + 1


def stem_parts(flow: Flow) -> Parts:
    """Count the parts of the stem.

    Returns:
        Of a block: "prologue", "norm" of a channel, and "weights" for each value that a thread writes. "tile": 32
        output channels with the window of a channels_last image; "tile.planes": with that of a contiguous one;
        "channels": 32 more without a window. In float32 "unit": of the window, which is read in a loop.
    """
    loops = loops_of(flow)
    product = "HMMA" if flow.count("HMMA") else "FFMA"
    around_tiles = [one for one in reversed(loops) if one.count(product) and one.count("BAR")]
    tiles = only(around_tiles, f"with a barrier and {product}")
    # The way back that is taken while there are more channels skips the step to the next tile.
    groups = min((one for one in loops if one.first == tiles.first), key=lambda one: one.last)
    inner = [one for one in loops if inside(one, tiles) and one.first > tiles.first]
    before = [one for one in loops if one.last < tiles.first]
    norm = only([one for one in before if one.count("FFMA") == 1], "over scales and shifts")
    # Of weights in the images' type, which are longer than those of float32; in float32 they are the same.
    weights = [one for one in before if one.count("STS") and one.count("LDG") and not one.count("FFMA")]

    def scored(window: float, planes: float = -1.0) -> Score:
        """Return the score of a way with a window or without, by 16-byte accesses."""

        def score(one: Instruction) -> tuple[float, ...]:
            tanh, reciprocal, _, flat, _ = longest(one)
            wide = float(one.name in ("LDG", "STG") and "128" in one.opcode.split("."))
            put = window * (one.name == "STS" or (one.name == "LDG" and window < 0))
            turned = planes * (one.name == "PRMT")  # planes into pixels
            return tanh, reciprocal, *((wide, put) if window > 0 else (put, wide)), turned, flat, window

        return score

    with_window = scored(1)
    parts = {
        "prologue": counters(way(flow, 0, tiles.first, with_window, [norm, *weights], ends=False)),
        "norm": norm_of_channel(flow, norm),
        "weights": around(flow, only(weights[-1:], "over weights")) * (1 / max(1, weights[-1].count("STS"))),
        "channels": around(flow, groups, inner, scored(-1)),
    }
    # The window was asked for a tile before.
    parts["tile"] = replace(around(flow, tiles, inner, with_window), trips=0.0)
    if not inner:
        parts["tile.planes"] = replace(around(flow, tiles, inner, scored(1, planes=1)), trips=0.0)
    else:  # in float32, a loop over units of the window, and one over rows of the kernel
        window = only([one for one in inner if one.count("STS")], "over units of the window")
        parts["unit"] = around(flow, window, (), with_window)
        rows = only([one for one in inner if one.count("FFMA") and one != window], "over rows of taps")
        for name in ("tile", "channels"):
            parts[name] = parts[name] + around(flow, rows) * 3
    return parts


def norm_act_parts(flow: Flow) -> Parts:
    """Count the pass over another library's result: prologue, norm of a channel, a row."""
    loops = loops_of(flow)
    rows = only([one for one in loops if one.count("STG")], "over rows")
    norm = only([one for one in loops if one.count("FFMA") == 1 and one.last < rows.first], "over scales")
    return {
        "prologue": counters(way(flow, 0, rows.first, longest, [norm], ends=False)),
        "norm": norm_of_channel(flow, norm),
        "vector": around(flow, rows) * (1 / rows.count("STG")),
        "vector.plain": around(flow, rows, (), plain) * (1 / rows.count("STG")),
    }


def scale_parts(flow: Flow) -> Parts:
    """Count the product with the gate: a vector."""
    loop = only([one for one in loops_of(flow) if one.count("STG")], "over vectors")
    return {
        "prologue": counters(way(flow, 0, loop.first, longest, (), ends=False)),
        "vector": around(flow, loop) * (1 / loop.count("STG")),
    }


def excite_parts(kernel: Kernel, flow: Flow) -> Parts:
    """Count squeeze_excite_gate: its two products."""
    loops = loops_of(flow)
    return {"finish": counters(way(flow, 0, None, longest, outermost(loops))), **gate_parts(kernel, flow, loops)}


_PARTS: Mapping[str, Callable[[Kernel, Flow], Parts]] = {
    "depthwise_strips": depthwise_parts,
    "depthwise_resident": depthwise_parts,
    "pointwise": lambda _, flow: pointwise_parts(flow),
    "pointwise_pool": lambda _, flow: pointwise_parts(flow),
    "expand_depthwise": expand_depthwise_parts,
    "mbconv": mbconv_parts,
    "mbconv_queue": lambda _, flow: mbconv_queue_parts(flow),
    "conv_stem": lambda _, flow: stem_parts(flow),
    "norm_act": lambda _, flow: norm_act_parts(flow),
    "scale_by_gate": lambda _, flow: scale_parts(flow),
    "squeeze_excite_gate": excite_parts,
}


def counted(kernel: Kernel) -> bool:
    """Return whether the parts are counted: those of sizes that are read at run time, and element by element, are
    not."""
    if kernel.family == "depthwise_strips":
        return int(kernel.arguments[1]) > 0
    if kernel.family in ("pointwise", "pointwise_pool"):
        return kernel.arguments[-1] == "false"
    return kernel.family in _PARTS


def parts_of(kernel: Kernel) -> Parts:
    """Count every part of a kernel; none of one that is not counted.

    Raises:
        PartMissing: the code does not have a part that is counted.
    """
    if not counted(kernel):
        return {}
    known = kernel.name, kernel.listing
    if known not in _counted:
        try:
            _counted[known] = _PARTS[kernel.family](kernel, Flow(instructions_of(kernel.listing)))
        except PartMissing as missing:
            raise PartMissing(f"{kernel.name}: {missing}") from missing
    return _counted[known]


# By name and listing: the claims, the tables and the counts of one run are of the same kernels.
_counted: dict[tuple[str, str], Parts] = {}


def count_kernels(kernels: Sequence[Kernel]) -> dict[str, KernelCounts]:
    """Return the table of the kernels for sm_90, by name without blanks.

    Raises:
        PartMissing: the code of a kernel does not have a part that is counted.
    """
    return {
        kernel.name.replace(" ", ""): KernelCounts(kernel.registers, parts_of(kernel))
        for kernel in kernels
        if kernel.arch == 90
    }

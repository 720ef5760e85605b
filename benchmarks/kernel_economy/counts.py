"""Instructions of a warp in each part of the kernels whose launches are estimated: `effkernels.plan.kernel_counts`.

Parts are found by what they do: the loop over rows of a depthwise strip has the multiply-adds of K taps, the main loop
of a product has the tensor instructions. `effkernels.plan.time_estimate` says how often each part runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from benchmarks.kernel_economy.loops import Flow, Instruction, Loop, instructions_of
from benchmarks.kernel_economy.paths import Score, counters, inside, longest, loops_of, plain, way
from benchmarks.kernel_economy.reading import Kernel
from benchmarks.kernel_economy.rules import element_bytes, strip
from effkernels.plan.kernel_counts import EXPAND_AHEAD, TILES_AHEAD, Counters, KernelCounts, reduce_lanes

Parts = dict[str, Counters]


class PartMissing(Exception):
    """The code of a kernel does not have a part that is counted."""


def only(loops: Sequence[Loop], words: str, kernel: Kernel) -> Loop:
    """Return the first of the loops that were found.

    Raises:
        PartMissing: there is none.
    """
    if not loops:
        raise PartMissing(f"{kernel.name}: no loop {words}")
    return loops[0]


def around(flow: Flow, loop: Loop, left_out: Sequence[Loop] = (), score: Score = longest) -> Counters:
    """Return one pass through a loop."""
    return counters(way(flow, loop.first, loop.last, score, left_out))


def norm_of_channel(flow: Flow, loop: Loop) -> Counters:
    """Scale and shift of a channel. Its parameters are asked for together (`stored_norm` in numeric.cuh): one wait."""
    return replace(around(flow, loop), trips=1.0)


def _is(loop: Loop, **wanted: int) -> bool:
    return all(loop.count(name) == times for name, times in wanted.items())


def innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Loops that hold no other."""
    return [one for one in loops if not any(inside(other, one) for other in loops)]


def gate_parts(flow: Flow, kernel: Kernel, loops: Sequence[Loop], images: int = 4) -> Parts:
    """Return the two products of squeeze-and-excitation: a pass over one vector of weights ("reduce", "expand.8": 8 at
    a time), without images and for each image, and what is around these loops for a row or channel, likewise.

    The loop of the first product holds 4 vectors of weights, that of the second EXPAND_AHEAD.

    Args:
        images: whose products are in the code, one after the other.
    """
    size = element_bytes(kernel)
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
    reduce = only(found, "over a row of w_reduce", kernel)
    outer = [one for one in loops if inside(reduce, one) and one.count("SHFL")]
    add("reduce", reduce, (), "FFMA", 4)
    rows = only(outer, "over the rows of w_reduce", kernel)
    # Two rows in the code, one after the other, for each of the two loops over them.
    shuffles = {4: 2, 16: 4}[reduce_lanes(kernel.family)]
    add("reduce.row", rows, [reduce], "SHFL", max(1, rows.count("SHFL") // (2 * shuffles * images)))
    for width in (each, 2, 1):
        found = [
            one
            for one in innermost(loops)
            if _is(one, FFMA=EXPAND_AHEAD * width * images, LDG=EXPAND_AHEAD, SHFL=0) and _wide(one, width * size)
        ]
        expand = only(found, f"over a row of w_expand, {width} at a time", kernel)
        outer = [one for one in loops if inside(expand, one) and one.count("MUFU")]
        add(f"expand.{width}", expand, (), "FFMA", EXPAND_AHEAD)
        add(f"expand.{width}.channel", only(outer, "over the channels of w_expand", kernel), [expand], "MUFU.RCP", 1)
    return parts


def _wide(loop: Loop, width: int) -> bool:
    """Return whether every load of global memory in a loop has this width in bytes."""
    names = {16: {"128"}, 8: {"64"}, 4: set(), 2: {"U16"}}[width]
    others = {"128", "64", "U16", "S16", "U8"} - names
    loads = [set(one.opcode.split(".")) for one in loop.instructions if one.name == "LDG"]
    return all(names <= words and not (others & words) for words in loads)


def depthwise_parts(kernel: Kernel) -> Parts:
    """Of a kernel that works on strips of pixels: prologue, rows of taps, strips, images, and what comes after them."""
    size, stride = int(kernel.arguments[1]), int(kernel.arguments[2])
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    vector = 16 // element_bytes(kernel)
    products, inputs = size * strip(kernel) * vector, (strip(kernel) - 1) * stride + size
    by_first = {one.first: one for one in loops if _is(one, FFMA=products, LDG=inputs, MUFU=0)}
    rows = list(by_first.values())
    short = strip(kernel) == 2  # its window is in registers, its rows one after the other in the code of a strip
    if len(rows) != (0 if short else 2):
        raise PartMissing(f"{kernel.name}: {len(rows)} loops over rows of inputs; wanted: {0 if short else 2}")
    around_rows = [one for one in loops if all(inside(row, one) for row in rows)]
    if short:
        around_rows = [one for one in loops if one.count("FFMA") >= size * products and one.count("STG") == 2]
    strips = only(around_rows, "over strips", kernel)
    images = only([one for one in loops if inside(strips, one) and one.count("BAR")], "over images or slabs", kernel)
    parts = {"strip": around(flow, strips, rows), "strip.plain": around(flow, strips, rows, plain)}
    if rows:
        parts["row"], parts["row.border"] = sorted((around(flow, row) for row in rows), key=lambda row: row.issued)
    resident = kernel.family == "depthwise_resident"
    before = [one for one in loops if (inside(one, images) if resident else True) and one.last < strips.first]
    taps = [one for one in before if one.count("LDG") and not one.count("FFMA") and not one.count("MUFU")]
    last = max(taps, key=lambda one: one.first, default=None)  # of weights in the images' type
    if last is None:
        raise PartMissing(f"{kernel.name}: no loop over taps")
    parts["taps"] = around(flow, last)  # TAP_VECTORS of 16 bytes; the norm of a channel is in the prologue
    lanes = [one for one in loops if one.first > strips.last and inside(one, images) and one.count("LDS")]
    sums = only(lanes, "over the lanes' sums", kernel)
    parts["lane"] = around(flow, sums) * (1 / sums.count("LDS"))
    hidden = [*before, strips, *lanes]
    if resident:
        parts["slab"] = around(flow, images, hidden)  # with the norm of a channel
        parts["prologue"] = counters(way(flow, 0, images.first, longest, ends=False))
    else:
        parts["image"] = around(flow, images, hidden)
        parts["prologue"] = counters(way(flow, 0, images.first, longest, before, ends=False))
    after = [one for one in loops if one.first > images.last]
    outermost = [one for one in after if not any(inside(one, other) for other in after)]
    called = _called(flow, images.last, min((one.first for one in after), default=0))
    parts["finish"] = counters(way(flow, called, None, longest, [*hidden, *outermost]))
    tiles = [one for one in innermost(after) if one.count("LDG") == TILES_AHEAD and not one.count("FFMA")]
    if tiles:
        parts["tile"] = around(flow, tiles[0]) * (1 / TILES_AHEAD)
    stores = [one for one in after if one.count("STG") and one.count("LDS") and one.count("FMUL")]
    if resident and stores:
        inner = innermost(stores)[0]
        parts["write"] = around(flow, inner) * (1 / inner.count("STG"))
    parts.update(gate_parts(flow, kernel, after, 1 if resident else 4))
    return parts


def _called(flow: Flow, after: int, before: int) -> int:
    """The block in which the work after the images begins: that of a function of its own, or the one that follows."""
    starts = {block[0].address: number for number, block in enumerate(flow.blocks)}
    for block in flow.blocks[after : before + 1]:
        for one in block:
            target = re.search(r"0x([0-9a-f]+)", one.operands) if one.name == "CALL" else None
            if target and after < starts.get(int(target[1], 16), -1) <= before:
                return starts[int(target[1], 16)]
    return after + 1


def pointwise_parts(kernel: Kernel) -> Parts:
    """Of a product: prologue, filling of the ring, a step along k, a tile, and what leaves through shared memory, which
    is told for each value of a lane."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    product = "HMMA" if kernel.count("HMMA") else "FFMA"
    most = max(one.count(product) for one in loops if one.count("BAR") == 1 and one.count("LDGSTS"))
    steps = only([one for one in loops if one.count(product) == most and one.count("BAR") == 1], "over k", kernel)
    tiles = only([one for one in loops if inside(steps, one)], "over tiles", kernel)
    before = [one for one in loops if one.last < tiles.first]
    outermost = [one for one in before if not any(inside(one, other) for other in before)]
    weights, fill = outermost[0], only([one for one in reversed(outermost) if one.count("LDGSTS") > 1], "ring", kernel)
    weights = only([one for one in outermost if one.first < fill.first and one.count("LDGSTS")], "over weights", kernel)
    of_fill = [one for one in before if inside(one, fill)]
    residuals = [one for one in outermost if weights.last < one.first < fill.first and one.count("LDGSTS") == 1]
    of_step = [one for one in loops if inside(one, steps)]
    # Copies of a step: first those of x, as many as fill a stage of the ring, then those of weights.
    of_x = len(_copies(fill, of_fill))
    weight_loads = {one.address for one in _copies(steps, of_step)[of_x:]}

    def scored(gate: float, weight: float) -> Score:
        def score(one: Instruction) -> tuple[float, ...]:
            copy = one.name == "LDGSTS"
            of_weight = copy and one.address in weight_loads
            return (
                float(one.name == product),
                float(copy and not of_weight),
                weight * of_weight,
                gate * (one.name in ("HMUL2", "FMUL") or one.opcode.startswith("HFMA2.MMA")),
                -1.0,
            )

        return score

    step = around(flow, steps, of_step, scored(-1, -1))
    prologue = way(flow, 0, tiles.first, longest, before, ends=False)
    parts = {
        "prologue": replace(counters(prologue), trips=1.0),  # for the norm, as in norm_of_channel
        "weights": around(flow, weights),
        "fill": around(flow, fill, of_fill),
        "step": step,
        "step.gated": around(flow, steps, of_step, scored(1, -1)),
        "step.weights": around(flow, steps, of_step, scored(-1, 1)) - step,
    }
    if of_fill:
        parts["gate"] = around(flow, of_fill[0])
    if residuals:
        parts["residual"] = around(flow, residuals[0])
    in_tile = [one for one in loops if inside(one, tiles) and one.first > steps.last]
    shared = [one for one in in_tile if not any(inside(one, other) for other in in_tile)]

    def with_reads(sign: float) -> Score:
        def score(one: Instruction) -> tuple[float, ...]:
            tanh, reciprocal, _, flat, _ = longest(one)
            return tanh, reciprocal, float(one.name in ("STG", "STS")), sign * float(one.name == "LDS"), flat, -1.0

        return score

    parts["tile"] = around(flow, tiles, [steps, *shared], with_reads(-1))
    parts["tile.residual"] = around(flow, tiles, [steps, *shared], with_reads(1)) - parts["tile"]
    if shared:
        inner = innermost(in_tile)
        vectors = only([one for one in in_tile if one.count("STG") and one.count("LDS")], "over vectors of y", kernel)
        of_parts = [one for one in inner if one.count("LDG") and not one.count("STG")]
        path = way(flow, vectors.first, vectors.last, longest, of_parts)
        each = 1 / sum(one.opcode in ("MUFU.TANH", "MUFU.RCP") for one in path)  # of a value: swish has one of them
        parts["value"] = counters(path) * each
        parts["value.plain"] = around(flow, vectors, of_parts, plain) * each
        parts["value.part"] = around(flow, vectors, of_parts, lambda one: (float(one.name == "STG"), -1.0)) * each
        if of_parts:
            parts["value.other"] = around(flow, of_parts[0]) * (1 / 4 / of_parts[0].count("LDG"))
    return parts


def _copies(loop: Loop, inner: Sequence[Loop]) -> list[Instruction]:
    """The asynchronous copies of a loop that are not in an inner one, in the order of the code."""
    others = {one.address for other in inner for one in other.instructions}
    return [one for one in loop.instructions if one.name == "LDGSTS" and one.address not in others]


def stem_parts(kernel: Kernel) -> Parts:
    """Of the stem, of channels_last images: a tile of 32 output channels with its window, further ones without."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    product = "HMMA" if kernel.count("HMMA") else "FFMA"
    tiles = only([one for one in reversed(loops) if one.count(product) and one.count("BAR")], "over tiles", kernel)
    inner = [one for one in loops if inside(one, tiles) and one.first > tiles.first]
    before = [one for one in loops if one.last < tiles.first]
    norm = only([one for one in before if one.count("FFMA") == 1], "over scales and shifts", kernel)
    # Of weights in the images' type, which come after those of float32; in float32 they are the same.
    weights = [one for one in before if one.count("STS") and one.count("LDG") and not one.count("FFMA")]

    def with_window(one: Instruction) -> tuple[float, ...]:
        """16-byte reads and writes, no turn of planes into pixels."""
        tanh, reciprocal, _, flat, each = longest(one)
        wide = one.name in ("LDG", "STG") and "128" in one.opcode.split(".")
        return tanh, reciprocal, float(wide), float(one.name == "STS"), -float(one.name == "PRMT"), flat, each

    def without(one: Instruction) -> tuple[float, ...]:
        tanh, reciprocal, _, flat, each = longest(one)
        wide = one.name == "STG" and "128" in one.opcode.split(".")
        return tanh, reciprocal, -float(one.name in ("STS", "LDG")), float(wide), flat, each

    parts = {
        "prologue": counters(way(flow, 0, tiles.first, with_window, before, ends=False)),
        "norm": norm_of_channel(flow, norm),
        "weights": around(flow, only(weights[-1:], "over weights", kernel)),
        "tile": replace(around(flow, tiles, inner, with_window), trips=0.0),  # its window was asked for a tile before
        "channels": around(flow, tiles, inner, without),
    }
    parts["weights"] = parts["weights"] * (1 / max(1, weights[-1].count("STS")))
    if inner:  # in float32, a loop over units of the window, and one over rows of the kernel
        window = only([one for one in inner if one.count("STS")], "over units of the window", kernel)
        parts["unit"] = around(flow, window, (), with_window)
        rows = only([one for one in inner if one.count("FFMA") and one != window], "over rows of taps", kernel)
        parts["tile"] = parts["tile"] + around(flow, rows) * 3
        parts["channels"] = parts["channels"] + around(flow, rows) * 3
    return parts


def norm_act_parts(kernel: Kernel) -> Parts:
    """Of the pass over another library's result: prologue, norm of a channel, a row."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    rows = only([one for one in loops if one.count("STG")], "over rows", kernel)
    norm = only([one for one in loops if one.count("FFMA") == 1 and one.last < rows.first], "over scales", kernel)
    return {
        "prologue": counters(way(flow, 0, rows.first, longest, [norm], ends=False)),
        "norm": norm_of_channel(flow, norm),
        "vector": around(flow, rows) * (1 / rows.count("STG")),
        "vector.plain": around(flow, rows, (), plain) * (1 / rows.count("STG")),
    }


def scale_parts(kernel: Kernel) -> Parts:
    """Of the product with the gate: a vector."""
    flow = Flow(instructions_of(kernel.listing))
    loop = only([one for one in loops_of(flow) if one.count("STG")], "over vectors", kernel)
    return {
        "prologue": counters(way(flow, 0, loop.first, longest, (), ends=False)),
        "vector": around(flow, loop) * (1 / loop.count("STG")),
    }


def excite_parts(kernel: Kernel) -> Parts:
    """Of squeeze_excite_gate: its two products."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    outermost = [one for one in loops if not any(inside(one, other) for other in loops)]
    return {"finish": counters(way(flow, 0, None, longest, outermost)), **gate_parts(flow, kernel, loops)}


_PARTS: Mapping[str, Callable[[Kernel], Parts]] = {
    "depthwise_strips": depthwise_parts,
    "depthwise_resident": depthwise_parts,
    "pointwise": pointwise_parts,
    "conv_stem": stem_parts,
    "norm_act": norm_act_parts,
    "scale_by_gate": scale_parts,
    "squeeze_excite_gate": excite_parts,
}


def counted(kernel: Kernel) -> bool:
    """Return whether the parts are counted: those of sizes that are read at run time, and element by element, are
    not."""
    if kernel.family == "depthwise_strips":
        return int(kernel.arguments[1]) > 0
    if kernel.family == "pointwise":
        return kernel.arguments[-1] == "false"
    return kernel.family in _PARTS


def count_kernels(kernels: Sequence[Kernel]) -> dict[str, KernelCounts]:
    """Return the table, of the kernels for sm_90.

    Raises:
        PartMissing: the code of a kernel does not have a part that is counted.
    """
    table = {}
    for kernel in kernels:
        if kernel.arch == 90:
            parts = _PARTS[kernel.family](kernel) if counted(kernel) else {}
            table[kernel.name.replace(" ", "")] = KernelCounts(kernel.registers, parts)
    return table

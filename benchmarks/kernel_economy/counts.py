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
from effkernels.plan.kernel_counts import Counters, KernelCounts

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
    """Scale and shift of a channel. Each parameter of 16 bits is waited for; the convolution of a network has no bias,
    and the loads of 32-bit parameters are beside those of 16 bits, one of them under a predicate that does not hold.
    """
    path = way(flow, loop.first, loop.last, longest)
    narrow = sum(one.name == "LDG" and "U16" in one.opcode.split(".") for one in path)
    return replace(counters(path), trips=float(max(narrow - 1, 1)))


def _is(loop: Loop, **wanted: int) -> bool:
    return all(loop.count(name) == times for name, times in wanted.items())


def innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Loops that hold no other."""
    return [one for one in loops if not any(inside(other, one) for other in loops)]


def gate_parts(flow: Flow, kernel: Kernel, loops: Sequence[Loop], images: int = 4) -> Parts:
    """Return the two products of squeeze-and-excitation: a pass over one vector of weights ("reduce", "expand.8": 8 at
    a time), without images and for each image, and what is around these loops for a row or channel, likewise.

    The loop of the first product holds 4 vectors of weights, that of the second 2.

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
    add("reduce.row", rows, [reduce], "SHFL", rows.count("SHFL") // (2 * 4 * images))
    for width in (each, each // 2, 1):
        found = [
            one
            for one in innermost(loops)
            if _is(one, FFMA=2 * width * images, LDG=2, SHFL=0) and _wide(one, width * size)
        ]
        expand = only(found, f"over a row of w_expand, {width} at a time", kernel)
        outer = [one for one in loops if inside(expand, one) and one.count("MUFU")]
        add(f"expand.{width}", expand, (), "FFMA", 2)
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
    if len(rows) != 2:
        raise PartMissing(f"{kernel.name}: {len(rows)} loops over rows of inputs; wanted: 2")
    strips = only([one for one in loops if all(inside(row, one) for row in rows)], "over strips", kernel)
    images = only([one for one in loops if inside(strips, one) and one.count("BAR")], "over images or slabs", kernel)
    plane, border = sorted((around(flow, row) for row in rows), key=lambda row: row.issued)
    parts = {
        "row": plane,
        "row.border": border,
        "strip": around(flow, strips, rows),
        "strip.plain": around(flow, strips, rows, plain),
    }
    resident = kernel.family == "depthwise_resident"
    before = [one for one in loops if (inside(one, images) if resident else True) and one.last < strips.first]
    taps = [one for one in before if one.count("LDG") and not one.count("FFMA") and not one.count("MUFU")]
    last = max(taps, key=lambda one: one.first, default=None)  # of weights in the images' type
    if last is None:
        raise PartMissing(f"{kernel.name}: no loop over taps")
    parts["taps"] = around(flow, last) * (1 / last.count("STS"))
    norm = only([one for one in before if one.count("FFMA") == 1], "over scales and shifts", kernel)
    parts["norm"] = norm_of_channel(flow, norm)
    lanes = [one for one in loops if one.first > strips.last and inside(one, images) and one.count("LDS")]
    sums = only(lanes, "over the lanes' sums", kernel)
    parts["lane"] = around(flow, sums) * (1 / sums.count("LDS"))
    hidden = [*before, strips, *lanes]
    if resident:
        parts["slab"] = around(flow, images, hidden)
        parts["prologue"] = counters(way(flow, 0, images.first, longest, ends=False))
    else:
        parts["image"] = around(flow, images, hidden)
        parts["prologue"] = counters(way(flow, 0, images.first, longest, before, ends=False))
    after = [one for one in loops if one.first > images.last]
    outermost = [one for one in after if not any(inside(one, other) for other in after)]
    called = _called(flow, images.last, min((one.first for one in after), default=0))
    parts["finish"] = counters(way(flow, called, None, longest, [*hidden, *outermost]))
    tiles = [one for one in innermost(after) if one.count("LDG") == 4 and not one.count("FFMA")]
    if tiles:
        parts["tile"] = around(flow, tiles[0]) * 0.25
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
    """Of a product on the tensor cores or by multiply-adds: prologue, a step along k, the epilogue."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    product = "HMMA" if kernel.count("HMMA") else "FFMA"
    most = max((one.count(product) for one in innermost(loops) if not one.count("STG")), default=0)
    steps = only([one for one in loops if one.count(product) == most and one.count("BAR")], "over k", kernel)
    after = [one for one in loops if one.first > steps.last]
    vectors = only([one for one in after if one.count("STG")], "over vectors of y", kernel)
    before = [one for one in loops if one.last < steps.first]
    norm = only([one for one in before if one.count("FFMA") == 1], "over scales and shifts", kernel)
    others = [one for one in before if one != norm]
    copies = [one for one in others if one.count("LDGSTS") == 4]

    def no_gate(one: Instruction) -> tuple[float, ...]:
        return -float(one.name in ("HMUL2", "FMUL") or ".BF16_V2" in one.opcode), *longest(one)

    inner_of_steps = [one for one in loops if inside(one, steps)]
    gated, ungated = around(flow, steps, inner_of_steps), around(flow, steps, inner_of_steps, no_gate)
    parts = {
        "prologue": counters(way(flow, 0, steps.first, longest, before, ends=False)),
        "norm": norm_of_channel(flow, norm),
        "step": ungated,
        "step.gated": gated,
        "sums": counters(way(flow, steps.last, vectors.first, longest, (), ends=False)),
        "vector": around(flow, vectors) * (1 / vectors.count("STG")),
        "vector.plain": around(flow, vectors, (), plain) * (1 / vectors.count("STG")),
    }
    if copies:
        parts["gate"] = around(flow, copies[0]) * 0.25
        parts["residual"] = around(flow, copies[-1]) * 0.25
    return parts


def conv_parts(kernel: Kernel) -> Parts:
    """Of the stem: loading of the window and of the parameters, 16 or 1 taps of the sums, a vector of the result."""
    flow = Flow(instructions_of(kernel.listing))
    loops = loops_of(flow)
    tensor = kernel.count("HMMA") > 0
    channels = only([one for one in loops if one.count("STG") and one.count("LDS") > 8], "over channels", kernel)
    sums = only(
        [one for one in innermost(loops) if inside(one, channels) and one.count("HMMA" if tensor else "FFMA") > 8
         and not one.count("STG")], "over taps", kernel,
    )  # fmt: skip
    vectors = only([one for one in loops if inside(one, channels) and one.count("STG")], "over vectors of y", kernel)
    hidden = [one for one in loops if inside(one, channels)]
    before = [one for one in loops if one.last < channels.first]
    window = only([one for one in before if one.count("LDG") >= 16 and one.count("STS") >= 16], "over x", kernel)
    columns = [one for one in before if inside(one, window)]
    norm = only([one for one in before if one.count("FFMA") == 1], "over scales and shifts", kernel)
    weights = [one for one in before if one.first > norm.last and one.count("STS") == 4]
    return {
        "prologue": counters(way(flow, 0, channels.first, longest, before, ends=False)),
        "norm": norm_of_channel(flow, norm),
        "window": around(flow, window, columns) * 0.25,
        "weights": around(flow, only(weights, "over weights", kernel)) * 0.25,
        "taps": around(flow, sums) * (1 / (sums.count("HMMA") / 8 if tensor else sums.count("FFMA") / 32)),
        "sums": around(flow, channels, hidden),
        "vector": around(flow, vectors),
        "vector.plain": around(flow, vectors, (), plain),
    }


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
    "conv": conv_parts,
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

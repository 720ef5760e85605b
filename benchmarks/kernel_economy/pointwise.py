"""The tiles of the pointwise kernels, and the instructions of a warp in each part of its work.

The kernel is a loop over tiles around a loop over steps along k. The loops before them fill the ring with the first
stages: of the weights, then of x.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.kernel_economy.loops import Flow, Instruction, Loop, innermost, inside, loops_of, only, outermost
from benchmarks.kernel_economy.paths import Score, around, counters, longest, plain, way, with_norm
from benchmarks.kernel_economy.reading import SOURCES, Kernel
from effkernels.plan.kernel_counts import Counters, total


@dataclass(frozen=True)
class Tile:
    """A row of kPointwiseTiles in pointwise.h: rows and columns of a tile, warps along each side and along k."""

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    warps_k: int


@functools.cache
def tiles() -> tuple[Tile, ...]:
    """Return the tiles of pointwise.h, in the order by which kernels are named."""
    source = (SOURCES / "pointwise.h").read_text(encoding="utf-8")
    (table,) = re.findall(r"kPointwiseTiles\[\] = \{(.*?)\};", source, flags=re.DOTALL)
    rows = re.findall(r"\{(\d+), (\d+), (\d+), (\d+), (\d+), \d+\}", table)
    return tuple(Tile(*map(int, row)) for row in rows)


def tile_of(kernel: Kernel) -> Tile:
    """Return the tile of a pointwise kernel, by its third template argument."""
    return tiles()[int(kernel.arguments[2])]


def epilogue_of(kernel: Kernel) -> str:
    """Return the epilogue of a pointwise kernel, by its fourth template argument: "identity", "silu" or "any"."""
    return ("identity", "silu", "any")[int(kernel.arguments[3])]


def pointwise_parts(flow: Flow) -> dict[str, Counters]:
    """Count the parts of a product.

    Returns:
        Of a block: "prologue"; for each of the first stages "weights" and "fill". "step" along k: without gates, and
        "step.gated" with gates, of which a thread copies one vector at most; "step.weights": more where the weights
        pass through the ring; "gate": to copy another vector of a stage's gates. "tile": its beginning, its end, and
        the addresses of its rows, which are formed in a step or in the first fill; "tile.gate", "tile.residual": more
        where there are gates, or a residual, whose copies are "residual". What leaves through shared memory is
        "value", for each value of a lane: ".plain" without special functions, ".part" as a partial sum, ".other" for
        each block that shares a tile. With pooling "image": for each image that a warp has rows of in a tile, or in 8
        rows of a vector of sums where those go through shared memory; "mean": for each mean of a thread, once for a
        block.

    Raises:
        PartMissing: the code does not have a part.
    """
    loops = loops_of(flow)
    product = "HMMA" if flow.count("HMMA") else "FFMA"
    around_steps = [one for one in loops if one.count("BAR") == 1 and one.count("LDGSTS") and one.count(product)]
    around_steps = innermost(around_steps)  # without barriers in its epilogue, the loop over tiles is among them
    most = max((one.count(product) for one in around_steps), default=0)
    steps = only([one for one in around_steps if one.count(product) == most], f"with a barrier, {product} and LDGSTS")
    tiles = only([one for one in loops if inside(steps, one)], "over tiles")
    before = [one for one in loops if one.last < tiles.first]
    stages = outermost(before)
    fill = only([one for one in reversed(stages) if one.count("LDGSTS") > 1], "over stages of x")
    weights = only([one for one in stages if one.first < fill.first and one.count("LDGSTS")], "over stages of weights")
    of_fill = [one for one in before if inside(one, fill)]
    of_step = sorted((one for one in loops if inside(one, steps)), key=lambda one: one.first)
    # The copies of the residual: at the beginning of a tile, or, where warps along k share it, in its first step.
    at_tile = [one for one in loops if inside(one, tiles) and one.last < steps.first]
    residuals = [one for one in (*at_tile, *of_step[:-1]) if one.count("LDGSTS") == 1]
    # Copies of a step: first those of x, as many as fill a stage of the ring, then those of weights.
    of_x = len(_copies(fill, of_fill))
    weight_loads = {one.address for one in _copies(steps, of_step)[of_x:]}

    def scored(gate: float = -1, weight: float = -1, move: float = -1) -> Score:
        """Return the score of a way with every product and copy of x, and with or without the rest."""

        def score(one: Instruction) -> tuple[float, ...]:
            copy = one.name == "LDGSTS"
            of_weight = copy and one.address in weight_loads
            return (
                float(one.name == product),
                float(copy and not of_weight),
                weight * of_weight,
                gate * (one.name in ("HMUL2", "FMUL") or one.opcode.startswith("HFMA2.MMA")),
                move * (one.name in ("VIMNMX", "VIADDMNMX")),  # the last row of y bounds those of a tile
                min(gate, move) * (one.name == "DMUL"),  # the image of a tile's first row
                -1.0,
            )

        return score

    def step_with(**wanted: float) -> Counters:
        return around(flow, steps, of_step, scored(**wanted))

    step, gated_step, first_fill = step_with(), step_with(gate=1), around(flow, fill, of_fill, scored())
    prologue = way(flow, 0, tiles.first, with_norm, before, ends=False)
    parts = {
        "prologue": replace(counters(prologue), trips=1.0),  # the parameters are asked for together
        "weights": around(flow, weights),
        "fill": first_fill,
        "step": step,
        "step.gated": gated_step,
        "step.weights": step_with(weight=1) - step,
    }
    if of_fill:  # the loop over copies of gates; in a step, that over copies of the residual comes before it
        parts["gate"] = around(flow, steps, of_step[:-1], scored(gate=1)) - gated_step
    if residuals:
        parts["residual"] = around(flow, residuals[0])
    in_tile = [one for one in loops if inside(one, tiles) and one.first > steps.last]

    def beginning(gate: float = -1, residual: float = -1) -> Counters:
        def score(one: Instruction) -> tuple[float, ...]:
            return gate * (one.name == "DMUL"), residual * (one.name == "LDGSTS"), -1.0

        return counters(way(flow, tiles.first, steps.first, score, ends=False))

    def ending(residual: float) -> Counters:
        def score(one: Instruction) -> tuple[float, ...]:
            tanh, reciprocal, _, flat, _ = longest(one)
            return tanh, reciprocal, float(one.name in ("STG", "STS")), residual * (one.name == "LDS"), flat, -1.0

        return counters(way(flow, steps.last + 1, tiles.last, score, outermost(in_tile)))

    move = step_with(move=1) - step
    parts["tile"] = beginning() + move + ending(residual=-1)
    parts["tile.gate"] = beginning(gate=1) - beginning() + step_with(move=1, gate=1) - gated_step - move
    parts["tile.residual"] = ending(residual=1) - ending(residual=-1)
    if at_tile:
        parts["tile.residual"] = parts["tile.residual"] + beginning(residual=1) - beginning() - parts["residual"]
    images = [one for one in innermost(in_tile) if one.count("SHFL")]
    if images:
        parts["image"] = total((around(flow, one), 1) for one in images)
        after = [one for one in loops if one.first > tiles.last]
        means = only([one for one in outermost(after) if one.count("LDS") and one.count("STG")], "over means")
        parts["mean"] = around(flow, means)
    # The values of a vector leave it, or its loop has one over images.
    vectors = [one for one in in_tile if one.count("LDS") and one.count("SHFL" if images else "STG")]
    vectors = [one for one in vectors if one not in images]
    if vectors or (in_tile and not images):
        parts.update(_through_shared(flow, only(vectors, "over vectors of sums"), in_tile, images))
    return parts


def _through_shared(flow: Flow, vectors: Loop, loops: Sequence[Loop], images: Sequence[Loop]) -> dict[str, Counters]:
    of_parts = [one for one in innermost(loops) if one.count("LDG") and not one.count("STG")]
    left_out = [*of_parts, *images]
    path = way(flow, vectors.first, vectors.last, longest, left_out)
    each = 1 / sum(one.opcode in ("MUFU.TANH", "MUFU.RCP") for one in path)  # of a value: swish has one of them
    parts = {"value": counters(path) * each, "value.plain": around(flow, vectors, left_out, plain) * each}
    if not images:
        parts["value.part"] = around(flow, vectors, left_out, lambda one: (float(one.name == "STG"), -1.0)) * each
    if of_parts:
        parts["value.other"] = around(flow, of_parts[0]) * (1 / 4 / of_parts[0].count("LDG"))
    return parts


def _copies(loop: Loop, inner: Sequence[Loop]) -> list[Instruction]:
    """Return the asynchronous copies of a loop that are not in an inner one, in the order of the code."""
    others = {one.address for other in inner for one in other.instructions}
    return [one for one in loop.instructions if one.name == "LDGSTS" and one.address not in others]

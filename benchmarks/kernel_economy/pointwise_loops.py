"""Instructions that a warp of the pointwise kernel issues: for a block, for each tile of rows, for each step along the
input channels, and to write a tile, counted in the disassembly along the way that a network's call takes.

The kernel is a loop over tiles around a loop over steps, which is known by its HMMA and its barrier. Backward branches
are left out, so that the ways from one place to another are finite in number. Of all ways with the wanted numbers of
certain instructions (every product, the copies of x, four parameters of the norm) the shortest is counted: what is
longer is a case that the networks do not have, rows of other images in one warp, say.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.kernel_economy.loops import Flow, Instruction, Loop, instructions_of
from benchmarks.kernel_economy.reading import SOURCES, Kernel

# As of loops.py, and the tensor cores; a copy to shared memory and an ldmatrix are what their units see of them.
_PIPES = {
    "HMMA": "tensor",
    "FFMA": "FMA",
    "FMUL": "FMA",
    "FADD": "FMA",
    "IMAD": "FMA",
    "HMUL2": "FMA",
    "MUFU": "special",
    "LDG": "load/store",
    "STG": "load/store",
    "LDGSTS": "load/store",
    "LDS": "shared",
    "STS": "shared",
    "LDSM": "shared",
}
PIPES = ("tensor", "FMA", "ALU", "special", "load/store", "shared")
STAGES_AHEAD = 3  # kPointwiseStages - 1 in pointwise.h: what a block loads before its first step
_SLICE_BYTES = 64


@dataclass(frozen=True)
class Tile:
    """A row of kPointwiseTiles in pointwise.h: rows and columns of a tile, warps along each side and along k."""

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    warps_k: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n * self.warps_k

    def copies(self, rows: int) -> int:
        """Copies of 16 bytes by which a thread takes part in one stage of `rows` rows."""
        at_once = self.threads // (_SLICE_BYTES // 16 * self.warps_k)
        return -(-rows // at_once)

    @property
    def products(self) -> int:
        """Multiply instructions of a warp for a step: 16x8 of y by 16 of k, two of them in a slice of 64 bytes."""
        return 2 * (self.rows // self.warps_m // 16) * (self.columns // self.warps_n // 8)


@functools.cache
def tiles() -> tuple[Tile, ...]:
    """The tiles of pointwise.h, in the order by which kernels are named."""
    source = (SOURCES / "pointwise.h").read_text(encoding="utf-8")
    (table,) = re.findall(r"kPointwiseTiles\[\] = \{(.*?)\};", source, flags=re.DOTALL)
    rows = re.findall(r"\{(\d+), (\d+), (\d+), (\d+), (\d+), \d+\}", table)
    return tuple(Tile(*map(int, row)) for row in rows)


def tile_of(kernel: Kernel) -> Tile:
    """Of a pointwise kernel, by its third template argument."""
    return tiles()[int(kernel.arguments[2])]


def epilogue_of(kernel: Kernel) -> str:
    """Of a pointwise kernel, by its fourth template argument: "identity", "silu" or "any", by way of shared memory."""
    return ("identity", "silu", "any")[int(kernel.arguments[3])]


@dataclass(frozen=True)
class PointwiseIssued:
    """Instructions of one warp by pipe, one of `PIPES`.

    Attributes:
        prologue: for a block, once: from the entry to its first tile. The first three stages, four parameters of the
            norm for each column.
        tile: for each tile: sums to zero, the images of its rows where there are gates, the addresses of the rows.
        step: for each step along k: two slices of 16 input channels, the copies of another stage of x, its gates
            where the kernel takes gates.
        weights: for each step in addition where the weights of a block's columns pass through the ring, and for the
            first tile where they are kept. Empty where their copies are predicated and issued in every step.
        epilogue: for each tile: every value scaled, shifted, activated and stored. Where sums go through shared memory
            that is for one pass of the loop over vectors.
        residual: for each tile in addition where a residual is added; its copies are left out.
    """

    prologue: Counter[str]
    tile: Counter[str]
    step: Counter[str]
    weights: Counter[str]
    epilogue: Counter[str]
    residual: Counter[str] = field(default_factory=Counter)


# The numbers by which ways are told apart, in the order of the names asked for.
_Key = tuple[int, ...]


@dataclass(frozen=True)
class _Way:
    """Blocks in the order in which they are executed, as a linked list, and how many instructions they have."""

    length: int
    block: int
    rest: _Way | None


class _Ways:
    """The shortest ways between two places of a function for every count of the named instructions."""

    def __init__(self, flow: Flow, names: Sequence[str | Collection[str]]) -> None:
        self._flow = flow
        groups = [(name,) if isinstance(name, str) else tuple(name) for name in names]
        self._own = [
            tuple(sum(one.name in group or one.opcode in group for one in block) for group in groups)
            for block in flow.blocks
        ]

    def between(self, start: int, stops: Collection[int]) -> dict[_Key, Counter[str]]:
        """Opcodes from the beginning of block `start` to the end of one of `stops`, by counts of what is named."""
        found: dict[int, dict[_Key, _Way]] = {}
        for number in range(max(stops), start - 1, -1):
            own, length = self._own[number], len(self._flow.blocks[number])
            here: dict[_Key, _Way] = {}
            if number in stops:
                here[own] = _Way(length, number, None)
            for to in self._flow.next[number]:
                if to <= number or number in stops:
                    continue
                for key, rest in found.get(to, {}).items():
                    new = tuple(a + b for a, b in zip(own, key, strict=True))
                    if new not in here or here[new].length > length + rest.length:
                        here[new] = _Way(length + rest.length, number, rest)
            found[number] = here
        return {key: self._opcodes(way) for key, way in found[start].items()}

    def _opcodes(self, way: _Way | None) -> Counter[str]:
        counted: Counter[str] = Counter()
        while way is not None:
            counted.update(one.opcode for one in self._flow.blocks[way.block])
            way = way.rest
        return counted


def _shortest(ways: Mapping[_Key, Counter[str]], wanted: Callable[[_Key], bool], what: str) -> Counter[str]:
    fitting = [opcodes for key, opcodes in ways.items() if wanted(key)]
    if not fitting:
        raise ValueError(f"no way through {what}; there are those with {sorted(ways)[:20]}")
    return min(fitting, key=lambda opcodes: sum(opcodes.values()))


def by_pipe(opcodes: Mapping[str, int]) -> Counter[str]:
    """Instructions by pipe, from instructions by opcode with modifiers."""
    pipes: Counter[str] = Counter()
    for opcode, times in opcodes.items():
        pipes[_PIPES.get(opcode.partition(".")[0], "ALU")] += times
    return pipes


def pointwise_issued(kernel: Kernel) -> PointwiseIssued:
    """Count the instructions of a 16-bit pointwise kernel that does not convert its inputs.

    Raises:
        ValueError: as `issued_by_tiles`.
    """
    return issued_by_tiles(instructions_of(kernel.listing), tile_of(kernel), epilogue_of(kernel) != "silu")


_LIMITS_OF_ROWS = ("VIMNMX", "VIADDMNMX")  # the last row of y: where addresses of rows are formed


def issued_by_tiles(code: Sequence[Instruction], tile: Tile, takes_gate: bool) -> PointwiseIssued:
    """Count the instructions of one of the 16-bit kernels.

    Args:
        tile: of the kernel's template arguments.
        takes_gate: whether it is compiled for a gate and a residual; then a step has a gate, all rows of a warp being
            of one image.

    Raises:
        ValueError: the code has not the loops that are looked for.
    """
    flow = Flow(code)
    around = [loop for loop in flow.loops() if loop.count("HMMA") == tile.products and loop.count("BAR")]
    if len(around) < 2:
        raise ValueError(f"{len(around)} loops of {tile.products} HMMA and a barrier; wanted: over steps, over tiles")
    around.sort(key=lambda loop: len(loop.instructions))
    steps = around[0]
    tiles = next(loop for loop in around if loop.first < steps.first and loop.last > steps.last)

    of_x, of_weight, of_gate = tile.copies(tile.rows), tile.copies(tile.columns), int(takes_gate)
    ways = _Ways(flow, ("HMMA", "HMUL2", "LDGSTS", _LIMITS_OF_ROWS)).between(steps.first, [steps.last])
    gates = max(key[1] for key in ways)
    # Where nvcc predicates the few copies of the weights instead of branching around them, each step issues them.
    copies = min(
        (
            key[2]
            for key in ways
            if key[:2] == (tile.products, gates) and key[2] >= of_x + of_gate and key[3] == of_gate
        ),
        default=0,
    )

    def step_of(copied: int, limits: int) -> Counter[str]:
        return _shortest(ways, lambda key: key == (tile.products, gates, copied, limits), f"{copied} copies of a step")

    step = step_of(copies, of_gate)
    predicated = copies == of_x + of_gate + of_weight
    weights = Counter[str]() if predicated else step_of(copies + of_weight, of_gate) - step
    moved = step_of(copies, of_gate + of_x) - step
    start = _tile_begins(flow, tiles, steps, takes_gate)
    return PointwiseIssued(
        prologue=by_pipe(_prologue(flow, tiles, of_x + of_gate, of_weight)),
        tile=by_pipe(start + moved),
        step=by_pipe(step),
        weights=by_pipe(weights),
        **_epilogue(flow, tiles, steps),
    )


def _tile_begins(flow: Flow, tiles: Loop, steps: Loop, takes_gate: bool) -> Counter[str]:
    ways = _Ways(flow, ("DMUL",)).between(tiles.first, [steps.first - 1])
    most = max(ways) if takes_gate else min(ways)
    return ways[most]


def _prologue(flow: Flow, tiles: Loop, of_x: int, of_weight: int) -> Counter[str]:
    """What is before the loop over tiles; its loops are over the stages ahead."""
    before = [loop for loop in flow.loops() if loop.last < tiles.first and loop.count("LDGSTS")]
    outer = [
        loop
        for loop in before
        if not any(other.first <= loop.first and loop.last <= other.last and other != loop for other in before)
    ]
    weight_loop, x_loop = outer[0], outer[-1]
    parameters = _Ways(flow, ("LDG", "LDGSTS"))
    ways = parameters.between(0, [tiles.first - 1])
    # Four parameters: a batch norm without a bias of the convolution.
    once = _shortest(ways, lambda key: key == (4, of_x + of_weight), "the prologue, with 4 parameters")
    counted = Counter(once)
    for loop, copied in ((weight_loop, of_weight), (x_loop, of_x)):
        round_trip = _shortest(
            parameters.between(loop.first, [loop.last]), lambda key, copied=copied: key[1] == copied, "a stage ahead"
        )
        for _ in range(STAGES_AHEAD - 1):
            counted += round_trip
    return counted


def _epilogue(flow: Flow, tiles: Loop, steps: Loop) -> dict[str, Counter[str]]:
    ways = _Ways(flow, ("MUFU.TANH", "STG", "LDS")).between(steps.last + 1, [tiles.last])
    activated, stored, _ = max(ways)
    complete = {key: opcodes for key, opcodes in ways.items() if key[:2] == (activated, stored)}
    plain = complete[min(complete)]
    with_residual = complete[max(complete)]
    return {"epilogue": by_pipe(plain), "residual": by_pipe(with_residual - plain)}

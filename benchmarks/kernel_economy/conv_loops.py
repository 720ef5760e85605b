"""Instructions that the stem's kernel issues for a tile of its result, and for a block before the first of its tiles.

Counted in the disassembly of conv_stem, along the way that a network takes: swish, x read and y written by vectors of
16 bytes, a whole tile inside the image, another tile to follow. Where several ways are left, the longest is counted: a
warp that reads a unit of the window (six of eight do), and a step to the next row of tiles.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.kernel_economy.loops import Flow, Instruction, by_pipe

# kConvWarpRows and kConvTileWidth of conv.h by kConvChannels, for the 32 lanes of a warp.
LANE_VALUES = 2 * 16 * 32 // 32


@dataclass(frozen=True)
class StemIssued:
    """Instructions of a warp by pipe ("FMA", "ALU", "special", "memory", "shared", "tensor").

    Attributes:
        window: for each tile, to read the next window, to put it into shared memory, and for the loop itself.
        product: for each tile and 32 output channels.
        epilogue: for each tile and 32 output channels: norm, activation, stores.
        prologue: for each block: parameters and the first window.
        values: of the result that a lane has of a tile and 32 output channels.
    """

    window: Counter[str]
    product: Counter[str]
    epilogue: Counter[str]
    prologue: Counter[str]
    values: int = field(default=LANE_VALUES)

    @property
    def tile(self) -> Counter[str]:
        """Of a tile of 32 output channels, without the block's part."""
        return self.window + self.product + self.epilogue

    def for_each_value(self, tiles: int | None = None) -> float:
        """Instructions for each value of the result, with 32 output channels.

        Args:
            tiles: of a block, over which its prologue is spread; without it, the prologue is left out.
        """
        prologue = self.prologue.total() / tiles if tiles else 0
        return (self.tile.total() + prologue) / self.values


def issued_by_stem(code: Sequence[Instruction], planes: bool) -> StemIssued:
    """Count what conv_stem issues in a 16-bit type.

    Args:
        code: the instructions of the kernel.
        planes: whether x is contiguous (NCHW) and turned in registers; else it is channels_last.

    Raises:
        ValueError: the code has not the loop that is looked for.
    """
    flow = Flow(code)
    tiles = [loop for loop in flow.loops() if loop.count("HMMA") and loop.count("BAR")]
    if not tiles:
        raise ValueError("no loop with a barrier and a product, one for each tile; wanted: 1")
    loop = max(tiles, key=lambda one: len(one.instructions))

    def wide(block: Sequence[Instruction]) -> int:
        return sum(one.name in ("LDG", "STG") and "128" in one.opcode.split(".") for one in block)

    def of_a_tile(block: Sequence[Instruction]) -> tuple[int, ...]:
        tanh = sum(one.opcode == "MUFU.TANH" for one in block)
        put = sum(one.name == "STS" for one in block)
        turned = sum(one.name == "PRMT" for one in block)
        return tanh, wide(block), put, turned if planes else -turned, len(block)

    way = _best_way(flow, loop.first, loop.last, of_a_tile)
    names = [{one.name for one in flow.blocks[number]} for number in way]
    products = [at for at, found in enumerate(names) if "HMMA" in found]
    stores = [at for at, found in enumerate(names) if "STG" in found]
    if not products or not stores or products[-1] >= stores[-1]:
        raise ValueError("no product before the stores of a tile")
    # Between the product and the norm, the next window is read.
    norm = next(at for at in range(products[-1] + 1, len(way)) if "FFMA" in names[at])

    def count(blocks: Sequence[int]) -> Counter[str]:
        return by_pipe(Counter(one.opcode for number in blocks for one in flow.blocks[number]))

    last = stores[-1] + 1
    return StemIssued(
        window=count([*way[: products[0]], *way[products[-1] + 1 : norm], *way[last:]]),
        product=count(way[products[0] : products[-1] + 1]),
        epilogue=count(way[norm:last]),
        prologue=count(_best_way(flow, 0, loop.first, lambda block: (wide(block), len(block)))[:-1]),
    )


def _best_way(
    flow: Flow, first: int, last: int, wanted: Callable[[Sequence[Instruction]], tuple[int, ...]]
) -> list[int]:
    """Return the blocks from `first` to `last`, no branch backwards, for which the sum of `wanted` is largest."""

    @functools.cache
    def best(number: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        own = wanted(flow.blocks[number])
        if number == last:
            return own, (number,)
        rests = [rest for to in set(flow.next[number]) if number < to <= last and (rest := best(to)) is not None]
        if not rests:
            return None
        sums, blocks = max(rests)
        return tuple(a + b for a, b in zip(own, sums, strict=True)), (number, *blocks)

    found = best(first)
    if found is None:
        raise ValueError(f"no way from block {first} to block {last}")
    return list(found[1])

"""The work of squeeze-and-excitation in a kernel: csrc/cuda/squeeze_excite.cuh, csrc/cuda/depthwise_sums.cuh."""

from __future__ import annotations

from effkernels.plan.cut import WARP, Clocks, Cut, ceil_divide, chain_of
from effkernels.plan.kernel_counts import EXPAND_AHEAD, HIDDEN_AHEAD, TILES_AHEAD, Counters, reduce_lanes, total


def reduce_product(cut: Cut, images: int, reduced: int, channels: int, size: int) -> tuple[Counters, Clocks]:
    """Return the first product of squeeze-and-excitation by one block, over `channels`: by all warps, and its chain.

    A warp has several rows at a time, and two such in turn.
    """
    part, lanes = cut.counts.part, reduce_lanes(cut.kernel)
    vectors = ceil_divide(channels, lanes * (16 // size))
    one = total(
        (
            (part("reduce.row"), 1),
            (part("reduce.row.image"), images),
            (part("reduce"), vectors),
            (part("reduce.image"), vectors * images),
        )
    )
    passes = ceil_divide(reduced, WARP // lanes * cut.warps)
    chain = chain_of(one, parameters=ceil_divide(vectors, 4)) * passes
    return one * ceil_divide(reduced, WARP // lanes), chain


def expand_product(cut: Cut, images: int, reduced: int, channels: int, size: int) -> tuple[Counters, Clocks]:
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
    passes = ceil_divide(channels, cut.threads)
    chain = chain_of(one, parameters=ceil_divide(vectors, EXPAND_AHEAD)) * passes
    return one * ceil_divide(channels, WARP), chain


def arrival_tail(
    cut: Cut, reduced: int, channels: int, block_channels: int, size: int
) -> tuple[Counters, Clocks, Clocks]:
    """Means and gate by last arrival: issued by all, in the body of each block, and after the last one."""
    part, images, groups, tiles = cut.counts.part, cut["images"], cut["channel_groups"], cut["tiles"]
    units = cut.grid // max(1, groups * tiles)
    issued = part("finish") * (cut.grid * cut.warps)
    means = Clocks(part("finish").issued)
    if tiles > 1:
        # Threads that have no channel of their own share the tiles.
        shared = ceil_divide(tiles, max(1, cut.threads // block_channels))
        issued = issued + part("tile") * (units * groups * cut.warps * shared)
        means = means + Clocks(part("tile").issued * shared, 0, ceil_divide(shared, TILES_AHEAD), 1)
    if not reduced:
        return issued, Clocks(), means
    product, chain = reduce_product(cut, images, reduced, min(block_channels, channels), size)
    expand, gate = expand_product(cut, images, reduced, channels, size)
    issued = issued + product * (units * groups) + expand * units
    sums = ceil_divide(images * reduced, cut.threads)
    hidden = Clocks(0, 0, sums * ceil_divide(groups, HIDDEN_AHEAD) + sums, 1)
    if tiles > 1:
        return issued, Clocks(), means + chain + hidden + gate
    return issued, means + chain, hidden + gate


def resident_tail(
    cut: Cut, reduced: int, channels: int, block_channels: int, size: int
) -> tuple[Counters, Clocks, Clocks]:
    """Return the gate by a team of resident blocks: each of them does its share, and waits twice for the others."""
    own = min(cut["slabs"] * block_channels, channels)
    product, chain = reduce_product(cut, 1, reduced, own, size)
    expand, gate = expand_product(cut, 1, reduced, own, size)
    issued = (product + expand) * cut.grid + cut.counts.part("finish") * (cut.grid * cut.warps)
    exchange = Clocks(cut.counts.part("finish").issued, 0, ceil_divide(reduced, cut.threads) * cut["team"] / 4 + 1, 2)
    return issued, chain + exchange + gate, Clocks()

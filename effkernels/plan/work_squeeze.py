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
    """Means, or the gate, by last arrival: issued by all, in the body of each block, and after the last one."""
    part, images, groups, tiles = cut.counts.part, cut["images"], cut["channel_groups"], cut["tiles"]
    units = cut.grid // max(1, groups * tiles)
    issued, own = part("finish") * (cut.grid * cut.warps), Clocks(part("finish").issued)
    if not reduced:
        if tiles == 1:
            return issued, own, Clocks()
        # Threads that have no channel of their own share the tiles.
        shared = ceil_divide(tiles, max(1, cut.threads // block_channels))
        issued = issued + part("tile") * (units * groups * cut.warps * shared)
        last = Clocks(part("tile").issued * shared, parameters=ceil_divide(shared, TILES_AHEAD))
        return issued, own + Clocks(arrivals=1), last
    product, chain = reduce_product(cut, images, reduced, min(block_channels, channels), size)
    expand, gate = expand_product(cut, images, reduced, channels, size)
    # Threads share the blocks whose products are added up, of four values where they can, and then add up their shares.
    name, width = ("hidden.4", 4) if reduced % 4 == 0 else ("hidden", 1)
    vectors = images * reduced // width
    room = min(cut.threads // vectors, cut["lanes"] * block_channels // (images * reduced))
    parts = max(1, min(room, groups * tiles))
    of_part, rounds = ceil_divide(groups * tiles, parts), ceil_divide(vectors, cut.threads)
    added, trips = part(name) * (of_part * rounds), ceil_divide(of_part, HIDDEN_AHEAD) * rounds
    if parts > 1:
        added = added + part("hidden.share") * (parts * ceil_divide(images * reduced, cut.threads))
    issued = issued + product * cut.grid + (added * cut.warps + expand) * units
    last = Clocks(added.issued, parameters=trips + ceil_divide(images * reduced, cut.threads))
    return issued, own + chain + Clocks(arrivals=1), last + gate


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

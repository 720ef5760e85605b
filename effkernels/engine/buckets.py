"""Divide a batch of any size into the few batch sizes that an engine has prepared."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable


def checked_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    """Batch sizes in rising order, each once.

    Raises:
        TypeError: one is no integer.
        ValueError: there is none, or one is below 1.
    """
    found = tuple(sizes)
    for size in found:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"batch_sizes={found}: {size!r} is {type(size).__name__}; allowed: int")
        if size < 1:
            raise ValueError(f"batch_sizes={found}: {size} is not allowed; each must be at least 1")
    if not found:
        raise ValueError("batch_sizes=(): at least one is needed")
    return tuple(sorted(set(found)))


def buckets_for(count: int, sizes: Iterable[int], overhead: float = 1.0) -> tuple[int, ...]:
    """Return the cheapest buckets that `count` images fit into.

    A bucket of size b costs b + overhead, whether it is full or padded, so padding is weighed against further calls: of
    sizes 1, 4 and 16, three images are one bucket of 4, and 17 are 16 + 1. The result depends on the arguments alone.

    Args:
        count: images, at least 0.
        sizes: of the buckets that there are, each at least 1.
        overhead: what a call costs however few images it has, in images.

    Returns:
        Sizes that add up to at least count, the largest first; of equally cheap ways the one with fewer buckets. The
        last bucket holds the padding. Empty for count=0.

    Raises:
        ValueError: count or overhead below 0, no sizes, a size below 1.
        TypeError: a size is no integer.
    """
    if count < 0 or overhead < 0:
        raise ValueError(f"buckets_for: count={count}, overhead={overhead}; both must be at least 0")
    return _cheapest(count, checked_sizes(sizes), overhead)


@functools.lru_cache(maxsize=4096)
def _cheapest(count: int, sizes: tuple[int, ...], overhead: float) -> tuple[int, ...]:
    largest = sizes[-1]
    # Among `largest` smaller buckets some always add up to a multiple of the largest, which costs no more in its place
    # (if each size divides the next, any that hold one largest do). So what exceeds that goes into the largest.
    chain = all(larger % smaller == 0 for smaller, larger in itertools.pairwise(sizes))
    whole = max(0, count // largest - (1 if chain else largest))
    rest = count - whole * largest
    # cost[n], the buckets used and the last one of them for the first n images
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
    for images in range(1, rest + 1):
        options = []
        for size in sizes:
            cost, used, _ = best[max(0, images - size)]
            options.append((cost + size + overhead, used + 1, size))
        best.append(min(options))
    found = []
    while rest > 0:
        found.append(best[rest][2])
        rest -= best[rest][2]
    return (largest,) * whole + tuple(sorted(found, reverse=True))

"""When a queue of items ends: blocks draw them one by one, in a fixed order, and some wait for others."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueOrder:
    """The items of one block of a network in csrc/cuda/mbconv_queue.cuh, and their places in the order of the launch.

    Attributes:
        units, images: of the expansion; the last unit may have fewer images.
        expand_items: of a unit.
        ahead: units that are expanded before the first one is projected.
        first_round: of the launch, which has one for every image that a block of the network expands or projects.
        project_items, columns: of the projection; those of the same rows.
        unit_rows, item_rows: rows of the result in a unit, and in an item that projects.
    """

    units: int
    images: int
    expand_items: int
    ahead: int
    first_round: int
    project_items: int
    columns: int
    unit_rows: int
    item_rows: int

    def projected(self, units: int) -> range:
        """Return the items that project rows of the first `units` units alone."""
        if units >= self.units:
            return range(self.project_items)
        return range(max(0, units) * self.unit_rows // self.item_rows * self.columns)

    def units_under(self, item: int) -> slice:
        """Return the units whose rows an item projects."""
        row = item // self.columns * self.item_rows
        last = min((row + self.item_rows - 1) // self.unit_rows, self.units - 1)
        return slice(row // self.unit_rows, last + 1)

    def units_before(self, unit: int, before: QueueOrder) -> slice:
        """Return the units of the block before this one whose images a unit has."""
        last = min(((unit + 1) * self.images - 1) // before.images, before.units - 1)
        return slice(unit * self.images // before.images, last + 1)


@dataclass(frozen=True)
class QueuedItems:
    """Items that follow each other in the order of a launch.

    Attributes:
        block: of the network, by its number.
        unit: of the block, that they expand; None where they project.
        items: by their numbers, of all items of the block that project; of those that expand the unit.
    """

    block: int
    unit: int | None
    items: range


def in_order(blocks: Sequence[QueueOrder]) -> Iterator[QueuedItems]:
    """Yield all items of the blocks of a network that share a launch, in its order."""
    places: list[tuple[int, int, int]] = []  # round, which of two kinds of each block, unit
    for number, block in enumerate(blocks):
        for unit in range(block.units):
            round_ = block.first_round + unit * block.images
            places.append((round_, 2 * number, unit))
            places.append((round_ + block.ahead * block.images, 2 * number + 1, unit))
    for _, kind, unit in sorted(places):
        block = blocks[kind // 2]
        if kind % 2 == 0:
            yield QueuedItems(kind // 2, unit, range(block.expand_items))
        else:
            done = len(block.projected(unit))
            yield QueuedItems(kind // 2, None, block.projected(unit + 1)[done:])


@dataclass(frozen=True)
class QueuedBlock:
    """Items of one block of a network, and how long each takes, in any unit of time.

    Attributes:
        start, project_start: of an item that expands, or projects, up to where it waits for its input.
        expand, project: of an item of each kind without waits, the start included.
        gate: from the end of the last item that expands a unit to its gate.
        leave: from the end of an item to that of its block of threads.
    """

    order: QueueOrder
    start: float
    expand: float
    gate: float
    project_start: float
    project: float
    leave: float


@functools.lru_cache(maxsize=1024)
def end_of_queue(slots: int, *blocks: QueuedBlock) -> float:
    """Return when the last item ends, if `slots` blocks of threads run at a time and each takes the next item."""
    free = [0.0] * slots  # a heap: when each ends its item
    ready = [[0.0] * block.order.units for block in blocks]  # by units: the gate is there
    written = [[0.0] * block.order.units for block in blocks]  # the result of the block is there
    for queued in in_order([block.order for block in blocks]):
        number, block = queued.block, blocks[queued.block]
        order = block.order
        if queued.unit is not None:
            given = 0.0
            if number:
                given = max(written[number - 1][order.units_before(queued.unit, blocks[number - 1].order)])
            for _ in queued.items:
                end = max(free[0] + block.start, given) + block.expand - block.start
                heapq.heapreplace(free, end + block.leave)
                ready[number][queued.unit] = max(ready[number][queued.unit], end + block.gate)
        else:
            for item in queued.items:
                under = order.units_under(item)
                end = max(free[0] + block.project_start, *ready[number][under]) + block.project - block.project_start
                heapq.heapreplace(free, end + block.leave)
                written[number][under] = [max(one, end) for one in written[number][under]]
    return max(free)

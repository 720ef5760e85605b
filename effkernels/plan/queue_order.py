"""When a queue of items ends: blocks draw them one by one, in a fixed order, and some wait for others."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueOrder:
    """The order of the items of one block of a network in csrc/cuda/mbconv_queue.cuh.

    Attributes:
        units, images: of the expansion; the last unit may have fewer images.
        expand_items: of a unit.
        ahead: units that are expanded before the first one is projected.
        project_items, columns: of the projection; those of the same rows.
        unit_rows, item_rows: rows of the result in a unit, and in an item that projects.
    """

    units: int
    images: int
    expand_items: int
    ahead: int
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
class QueuedBlock:
    """Items of one block of a network, and how long each takes, in any unit of time.

    Attributes:
        start: of an item that expands, up to where it waits for its input.
        expand, project: of an item of each kind without waits, the start included.
        gate: from the end of the last item that expands a unit to its gate.
    """

    order: QueueOrder
    start: float
    expand: float
    gate: float
    project: float


@functools.lru_cache(maxsize=1024)
def end_of_queue(slots: int, *blocks: QueuedBlock) -> float:
    """Return when the last item ends, if `slots` blocks of threads run at a time and each takes the next item."""
    free = [0.0] * slots  # a heap: when each ends its item
    written: list[float] = []  # by units of the block before
    for number, block in enumerate(blocks):
        order = block.order
        ready, results = [0.0] * order.units, [0.0] * order.units
        for unit in range(order.units + order.ahead):
            if unit < order.units:
                given = max(written[order.units_before(unit, blocks[number - 1].order)]) if number else 0.0
                for _ in range(order.expand_items):
                    end = max(free[0] + block.start, given) + block.expand - block.start
                    heapq.heapreplace(free, end)
                    ready[unit] = max(ready[unit], end + block.gate)
            done = unit - order.ahead
            for item in order.projected(done + 1)[len(order.projected(done)) :]:
                under = order.units_under(item)
                end = max(free[0], *ready[under]) + block.project
                heapq.heapreplace(free, end)
                results[under] = [max(one, end) for one in results[under]]
        written = results
    return max(free)

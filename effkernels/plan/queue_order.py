"""When a queue of items ends: blocks draw them one by one, in a fixed order, and some wait for others."""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class QueueOrder:
    """The order of the items of csrc/cuda/mbconv_queue.cuh.

    Attributes:
        units, expand_items: of the expansion, and its items in each.
        ahead: units that are expanded before the first one is projected.
        project_items, columns: of the projection; those of the same rows.
        unit_rows, item_rows: rows of the result in a unit, and in an item that projects.
    """

    units: int
    expand_items: int
    ahead: int
    project_items: int
    columns: int
    unit_rows: int
    item_rows: int

    def _projected(self, units: int) -> int:
        """Items that project rows of the first `units` units alone."""
        return self.project_items if units >= self.units else units * self.unit_rows // self.item_rows * self.columns

    @functools.cache  # noqa: B019 - an order is a few numbers
    def end(self, slots: int, expand: float, gate: float, project: float) -> float:
        """Return when the last item ends, if `slots` blocks run at a time and each takes the next item.

        Args:
            slots: blocks that run at a time.
            expand, project: time of an item of each kind.
            gate: time from the end of the last item that expands a unit to its gate.
        """
        free = [0.0] * slots  # a heap: when each block ends its item
        ready = [0.0] * self.units
        for number in range(self.units + self.ahead):
            if number < self.units:
                for _ in range(self.expand_items):
                    end = free[0] + expand
                    heapq.heapreplace(free, end)
                    ready[number] = max(ready[number], end + gate)
            of_round = range(*(self._projected(max(0, number - self.ahead + more)) for more in (0, 1)))
            for item in of_round:
                row = item // self.columns * self.item_rows
                last = min((row + self.item_rows - 1) // self.unit_rows, self.units - 1)
                start = max(free[0], *ready[row // self.unit_rows : last + 1])
                heapq.heapreplace(free, start + project)
        return max(free)

"""A planned launch as an estimate needs it: its cut into blocks with the counted instructions, and its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from effkernels.plan.kernel_counts import Counters, KernelCounts, Sums
from effkernels.plan.queue_order import QueueOrder
from effkernels.plan.record import RecordedCall

WARP = 32
_FLAT = ("identity", "relu", "relu6", "hard_swish")  # no special functions


@dataclass(frozen=True)
class Clocks(Sums):
    """A chain of instructions and round trips that follow each other within a warp.

    Attributes:
        issued: instructions.
        inputs: waits for data that another launch wrote.
        parameters: waits for parameters, or for what other blocks of this launch wrote: from L2.
        cached: waits for data that a neighbour has just read: from L1.
        arrivals: writes made visible and counted, for the block that comes last.
    """

    issued: float = 0.0
    inputs: float = 0.0
    parameters: float = 0.0
    arrivals: float = 0.0
    cached: float = 0.0


@dataclass(frozen=True)
class Queue:
    """Items in their order, and their chains: as of `QueuedBlock`."""

    order: QueueOrder
    start: Clocks
    expand: Clocks
    gate: Clocks
    project_start: Clocks
    project: Clocks
    leave: Clocks


@dataclass(frozen=True)
class Work:
    """The work of one launch.

    Attributes:
        issued: by all warps of all blocks.
        registers: of a thread.
        l2_bytes: between L2 and the multiprocessors: tiles and borders as often as blocks read them.
        prologue: chain of a block before its first input.
        body: chain of a block after that.
        last: chain of the last block alone, once all others are done: squeeze-and-excitation by last arrival.
        queue: the items whose order blocks follow, and that wait for each other.
    """

    issued: Counters
    registers: int
    l2_bytes: float
    prologue: Clocks
    body: Clocks
    last: Clocks
    queue: Queue | None = None


@dataclass(frozen=True)
class Cut:
    """The division of a launch into blocks.

    Attributes:
        kernel: its name without template arguments.
        grid, threads: blocks, and threads of a block.
        sizes: further numbers of the plan by name, as `cuda_plan` gives them.
        counts: the kernel's instructions.
        items: of a queue, by kind: the launches whose blocks they are.
    """

    kernel: str
    grid: int
    threads: int
    sizes: Mapping[str, int]
    counts: KernelCounts
    items: Mapping[str, Cut] = field(default_factory=dict)

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    @property
    def warps(self) -> int:
        """Of a block."""
        return ceil_divide(self.threads, WARP)


def ceil_divide(value: float, by: float) -> int:
    return int(-(-value // by))


def chain_of(counters: Counters, *, inputs: float = 0.0, parameters: float = 0.0) -> Clocks:
    return Clocks(counters.issued, inputs, parameters)


def with_activation(cut: Cut, part: str, activation: str) -> Counters:
    """Return a part that activates: its way with special functions, or that without."""
    return cut.counts.part(f"{part}.plain" if activation in _FLAT else part)


def tensor_bytes(call: RecordedCall, name: str) -> int:
    tensor = call.arguments.get(name)
    return 0 if tensor is None else int(tensor.numel() * tensor.element_size())

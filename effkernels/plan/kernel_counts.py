"""Instructions that a warp issues in each part of a CUDA kernel, counted in the disassembly and shipped as a table.

`make kernels-table` counts them (benchmarks/kernel_economy) and writes ``kernel_counts.json``; time estimates
(`effkernels.plan.time_estimate`) read them where there is no disassembler. They are of the code for sm_90.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar

# How csrc/cuda has it: the vectors of taps that a thread reads at once (copy_taps), those of a row of w_expand
# (expand_product), the hidden values and the sums of tiles that are added at once (finish_sums), the pixels of x that a
# thread asks for at once (load_expand_rows); and the blocks of a cluster whose sums of y, or hidden values, it asks for
# at once (add_partial, gate_of_cluster).
TAP_VECTORS, EXPAND_AHEAD, HIDDEN_AHEAD, TILES_AHEAD, LOADS_AHEAD = 4, 6, 12, 8, 4
RANKS_AHEAD, HIDDEN_RANKS_AHEAD = 16, 16


def reduce_lanes(kernel: str) -> int:
    """Return the number of threads that share a row of w_reduce (reduce_product): few if a block has few channels."""
    return 4 if kernel in ("depthwise_strips", "expand_depthwise") else 16


FILE = Path(__file__).with_name("kernel_counts.json")


Summed = TypeVar("Summed", bound="Sums")


@dataclass(frozen=True)
class Sums:
    """Figures that are added, and multiplied by a number, field by field."""

    def __add__(self: Summed, other: Summed) -> Summed:
        return type(self)(*(one + more for one, more in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self: Summed, other: Summed) -> Summed:
        return self + other * -1

    def __mul__(self: Summed, times: float) -> Summed:
        return type(self)(*(one * times for one in astuple(self)))


@dataclass(frozen=True)
class Counters(Sums):
    """Instructions of one warp, by the unit that executes them.

    Attributes:
        issued: all of them; each takes an issue slot.
        fma: float32 multiply-adds, products and sums, packed 16-bit ones, integer multiply-adds.
        alu: other arithmetic on integers and bits, comparisons, conversions.
        special: of the special function units.
        memory: loads and stores, of global and of shared memory, and shuffles.
        wavefronts: clocks that these take on the 128 bytes a clock between a multiprocessor and its L1 cache and shared
            memory, without bank conflicts.
        tensor: matrix products of 4096 16-bit operations, or of 2048 TF32 ones, which take as long.
        trips: times that the warp waits for loads from global memory.
    """

    issued: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    special: float = 0.0
    memory: float = 0.0
    wavefronts: float = 0.0
    tensor: float = 0.0
    trips: float = 0.0


PIPES = tuple(field.name for field in fields(Counters))


@dataclass(frozen=True)
class KernelCounts:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        parts: what one warp issues in one pass through a part, by the part's name.
    """

    registers: int
    parts: Mapping[str, Counters]

    def part(self, name: str) -> Counters:
        """Return the counters of a part; zeros for one that the kernel does not have."""
        return self.parts.get(name, Counters())


def to_json(kernels: Mapping[str, KernelCounts]) -> str:
    """Return the table as JSON, sorted, one kernel a line; numbers of a part in the order of `PIPES`."""
    lines = []
    for name in sorted(kernels):
        entry = {
            "registers": kernels[name].registers,
            "parts": {part: [_short(value) for value in astuple(kernels[name].parts[part])]
                      for part in sorted(kernels[name].parts)},
        }  # fmt: skip
        lines.append(f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _short(value: float) -> float:
    rounded = round(value, 3)
    return int(rounded) if rounded == int(rounded) else rounded


def from_json(text: str) -> dict[str, KernelCounts]:
    """Return the table that `to_json` wrote."""
    return {
        name: KernelCounts(entry["registers"], {part: Counters(*values) for part, values in entry["parts"].items()})
        for name, entry in json.loads(text).items()
    }


@functools.cache
def shipped() -> Mapping[str, KernelCounts]:
    """Read the table of the package, by name with template arguments: "depthwise_strips<bfloat16,3,1,7>"."""
    return from_json(FILE.read_text(encoding="utf-8"))


def total(parts: Iterable[tuple[Counters, float]]) -> Counters:
    """Return the sum of parts, each as often as the number beside it says."""
    result = Counters()
    for counters, times in parts:
        result = result + counters * times
    return result

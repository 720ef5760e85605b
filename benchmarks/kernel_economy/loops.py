"""The blocks and loops of a kernel's disassembly.

The code is cut where branches lead to and where they leave; a loop is a backward branch.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.kernel_economy.reading import INSTRUCTION

_ENDS = {"EXIT", "RET", "BRX", "JMX"}


class PartMissing(Exception):
    """The code of a kernel does not have a part that is counted."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its opcode with modifiers, the branch's target (None if there is none, or where
    it is found at run time), whether it is executed under a predicate, its operands as written, and whether it is never
    executed: nvcc puts such loads in front of a cp.async that follows a branch."""

    address: int
    opcode: str
    target: int | None
    predicated: bool
    operands: str = ""
    idle: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def instructions_of(code: str) -> tuple[Instruction, ...]:
    """Return the instructions of one function of a listing of cuobjdump --dump-sass, without NOPs."""
    found = []
    for address, predicate, opcode, operands in INSTRUCTION.findall(code):
        if opcode == "NOP":
            continue
        target = None
        if opcode.startswith("BRA"):
            match = re.search(r"0x([0-9a-f]+)", operands)
            target = int(match[1], 16) if match else None
            # "BRA P6, ..." and "BRA.DIV UR4, ..." are taken under a condition too.
            predicate = predicate or re.match(r"\s*(~?URZ|!?U?P\d|~?UR\d+),", operands) is not None
        idle = str(predicate).strip() == "@!PT"
        found.append(Instruction(int(address, 16), opcode, target, bool(predicate), operands, idle))
    return tuple(found)


@dataclass(frozen=True)
class Loop:
    """A loop as first and last block, and the instructions in it."""

    first: int
    last: int
    instructions: tuple[Instruction, ...]

    def count(self, name: str) -> int:
        """Return how many instructions have this opcode."""
        return sum(one.name == name for one in self.instructions)


class Flow:
    """The blocks of a function, in the order of the code, and the blocks that can follow each of them."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = tuple(code)
        starts = {code[0].address} | {one.target for one in code if one.target is not None}
        for one, following in itertools.pairwise(code):
            if one.target is not None or one.name in _ENDS:
                starts.add(following.address)
        self.blocks: list[list[Instruction]] = []
        for one in code:
            if one.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(one)
        at = {block[0].address: number for number, block in enumerate(self.blocks)}
        self.next: list[list[int]] = []
        for number, block in enumerate(self.blocks):
            last = block[-1]
            goes_on = last.name not in _ENDS and not (last.target is not None and not last.predicated)
            after = [number + 1] if (goes_on or last.predicated) and number + 1 < len(self.blocks) else []
            self.next.append([*after, *([at[last.target]] if last.target in at else [])])
        self._add_jump_tables()

    def _add_jump_tables(self) -> None:
        """A jump through a table goes to the blocks after it that nothing else goes to."""
        reached = {0, *(to for following in self.next for to in following)}
        tables = [number for number, block in enumerate(self.blocks) if block[-1].name == "BRX"]
        for number, end in itertools.pairwise([*tables, len(self.blocks)]):
            self.next[number] += [to for to in range(number + 1, end) if to not in reached]

    def count(self, name: str) -> int:
        """Return how many instructions have this opcode."""
        return sum(one.name == name for one in self.code)

    def loops(self) -> Iterator[Loop]:
        """Return every loop, by its backward branch."""
        for number, following in enumerate(self.next):
            for to in following:
                if to <= number:
                    inside = [one for block in self.blocks[to : number + 1] for one in block]
                    yield Loop(to, number, tuple(inside))


def loops_of(flow: Flow) -> list[Loop]:
    """Return the loops of a function, one for each first block and last block, the shortest first.

    Not the ways back from code after the function's end, to which a warp goes whose lanes disagree.
    """

    def ends(loop: Loop) -> bool:
        return any(one.name in ("EXIT", "RET") and not one.predicated for one in loop.instructions)

    found = {(loop.first, loop.last): loop for loop in flow.loops() if len(loop.instructions) > 1 and not ends(loop)}
    return sorted(found.values(), key=lambda loop: len(loop.instructions))


def inside(inner: Loop, outer: Loop) -> bool:
    """Return whether a loop is in another one."""
    return outer.first <= inner.first and inner.last <= outer.last and inner != outer


def innermost(loops: Sequence[Loop]) -> list[Loop]:
    """Return the loops that hold no other."""
    return [one for one in loops if not any(inside(other, one) for other in loops)]


def outermost(loops: Sequence[Loop]) -> list[Loop]:
    """Return the loops that are in no other."""
    return [one for one in loops if not any(inside(one, other) for other in loops)]


def only(loops: Sequence[Loop], words: str) -> Loop:
    """Return the first of the loops that were found.

    Raises:
        PartMissing: there is none.
    """
    if not loops:
        raise PartMissing(f"no loop {words}")
    return loops[0]

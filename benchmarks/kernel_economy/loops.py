"""Instructions that a kernel issues for each value of its result, counted along the path that a call takes.

The disassembly is cut into blocks, its loops are found by their backward branches, and an inner loop counts as often as
the source says. Among the ways through the code of an activation, that of swish is followed: the one with MUFU.TANH.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ENDS = {"EXIT", "RET", "BRX", "JMX"}
# The pipe that executes an opcode on sm_90; what is not named goes through the ALU, one result per two clocks and lane.
_PIPES = {
    "FFMA": "FMA",
    "FMUL": "FMA",
    "FADD": "FMA",
    "IMAD": "FMA",
    "MUFU": "special",
    "LDG": "memory",
    "STG": "memory",
    "LDS": "shared",
    "STS": "shared",
    "LDSM": "shared",
    "HMMA": "tensor",
}


def by_pipe(opcodes: Counter[str]) -> Counter[str]:
    """Instructions by the pipe that executes them."""
    found: Counter[str] = Counter()
    for opcode, times in opcodes.items():
        found[_PIPES.get(opcode.partition(".")[0], "ALU")] += times
    return found


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its opcode with modifiers, the branch's target (None if there is none, or where
    it is found at run time), whether it is executed under a predicate, and its operands as written."""

    address: int
    opcode: str
    target: int | None
    predicated: bool
    operands: str = ""

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def instructions_of(code: str) -> tuple[Instruction, ...]:
    """Return the instructions of one function of a listing of cuobjdump --dump-sass, without NOPs."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = []
    for address, predicate, opcode, operands in re.findall(pattern, code, flags=re.MULTILINE):
        if opcode == "NOP":
            continue
        target = None
        if opcode.startswith("BRA"):
            match = re.search(r"0x([0-9a-f]+)", operands)
            target = int(match[1], 16) if match else None
            # "BRA P6, ..." and "BRA.DIV UR4, ..." are taken under a condition too.
            predicate = predicate or re.match(r"\s*(~?URZ|!?U?P\d|~?UR\d+),", operands) is not None
        found.append(Instruction(int(address, 16), opcode, target, bool(predicate), operands))
    return tuple(found)


@dataclass(frozen=True)
class Loop:
    """A loop as first and last block, and the instructions in it."""

    first: int
    last: int
    instructions: tuple[Instruction, ...]

    def count(self, name: str) -> int:
        """Instructions of an opcode."""
        return sum(one.name == name for one in self.instructions)


class Flow:
    """The blocks of a function, in the order of the code, and the blocks that can follow each of them."""

    def __init__(self, code: Sequence[Instruction]) -> None:
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

    def loops(self) -> Iterator[Loop]:
        """Return every loop, by its backward branch."""
        for number, following in enumerate(self.next):
            for to in following:
                if to <= number:
                    inside = [one for block in self.blocks[to : number + 1] for one in block]
                    yield Loop(to, number, tuple(inside))

    def longest(self, loop: Loop, inner: Sequence[tuple[Loop, Counter[str]]]) -> Counter[str]:
        """Opcodes along one way around a loop: of the ways with the most MUFU.TANH, the one with most instructions.

        Args:
            inner: loops inside of it, and what counts for all of such a loop, wherever it is entered.
        """

        @functools.cache
        def best(number: int) -> tuple[int, int, tuple[tuple[str, int], ...]] | None:
            last, own = number, Counter(one.opcode for one in self.blocks[number])
            ahead = set(self.next[number])
            for row, counted in inner:
                if row.first <= number <= row.last:
                    last, own = row.last, Counter(counted)
                    ahead = {to for block in range(row.first, row.last + 1) for to in self.next[block]}
            rests: list[tuple[int, int, tuple[tuple[str, int], ...]]] = [(0, 0, ())]
            if last != loop.last:
                ahead = {to for to in ahead if last < to <= loop.last}
                rests = [rest for to in ahead if (rest := best(to)) is not None]
            if not rests:
                return None
            own = own + Counter(dict(max(rests)[2]))
            return own["MUFU.TANH"], sum(own.values()), tuple(own.items())

        found = best(loop.first)
        if found is None:
            raise ValueError(f"no way from block {loop.first} to block {loop.last}")
        return Counter(dict(found[2]))


@dataclass(frozen=True)
class Issued:
    """Instructions for each value of the result.

    Attributes:
        inside, border: of a strip inside the image, and of one at its left or right border.
        pipes: of a strip inside, by pipe.
    """

    inside: float
    border: float
    pipes: dict[str, float]


def issued_by_strips(code: Sequence[Instruction], kernel: int, stride: int, strip: int, vector: int) -> Issued:
    """Of depthwise_strips and depthwise_resident: a strip of `strip` pixels by `vector` channels.

    Args:
        kernel, stride: of the convolution; the loop over a row of inputs is run once for each row of the kernel.

    Raises:
        ValueError: the code has not the loops that are looked for.
    """
    flow = Flow(code)
    products, inputs = kernel * strip * vector, (strip - 1) * stride + kernel
    loops = sorted(flow.loops(), key=lambda loop: len(loop.instructions))
    # Over a row of inputs. The longest of those with one beginning: a `continue` is a backward branch too.
    rows = {
        loop.first: loop
        for loop in loops
        if loop.count("FFMA") == products and loop.count("LDG") == inputs and not loop.count("MUFU")
    }
    if len(rows) != 2:
        raise ValueError(
            f"{len(rows)} loops of {products} FFMA and {inputs} LDG, one for each row of inputs; wanted: 2"
        )
    strips = next(one for one in loops if all(one.first < row.first and row.last < one.last for row in rows.values()))
    counted = []
    for chosen in rows.values():
        each = Counter({name: kernel * times for name, times in Counter(o.opcode for o in chosen.instructions).items()})
        counted.append(flow.longest(strips, [(row, each if row is chosen else Counter()) for row in rows.values()]))
    inside, border = sorted(counted, key=lambda opcodes: sum(opcodes.values()))
    values = strip * vector
    return Issued(
        sum(inside.values()) / values,
        sum(border.values()) / values,
        {pipe: n / values for pipe, n in by_pipe(inside).items()},
    )


def issued_by_windows(code: Sequence[Instruction], kernel: int, values: int) -> Issued:
    """Of a short strip, whose window is read at once: inside the image and at its border the code is the same.

    Args:
        kernel: size of the convolution.
        values: of the result, of a strip.

    Raises:
        ValueError: there is no loop over strips.
    """
    flow = Flow(code)
    strips = [
        loop for loop in flow.loops() if loop.count("FFMA") >= kernel * kernel * values and loop.count("STG") == 2
    ]
    if not strips:
        raise ValueError(f"no loop over strips of {values} values")
    counted = flow.longest(min(strips, key=lambda loop: len(loop.instructions)), [])
    total = sum(counted.values()) / values
    return Issued(total, total, {pipe: times / values for pipe, times in by_pipe(counted).items()})

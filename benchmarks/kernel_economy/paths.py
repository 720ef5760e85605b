"""The way that a warp takes through a function, and what it issues on it.

`Flow` of ``loops`` cuts the disassembly into blocks; `way` follows its best-scoring forward path, with inner loops left
out; `counters` sorts what is on that path by the unit that executes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from benchmarks.kernel_economy.loops import Flow, Instruction, Loop, PartMissing
from effkernels.plan.kernel_counts import Counters

Score = Callable[[Instruction], tuple[float, ...]]

_FMA = {"FFMA", "FMUL", "FADD", "IMAD", "HFMA2", "HMUL2", "HADD2", "FFMA2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "I2FP", "F2F", "POPC", "FLO"}
_MEMORY = {
    *("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED", "SHFL"),
    *("LDL", "STL", "LDC", "S2R", "MATCH", "REDUX"),
}
# Issued, and executed beside the arithmetic units: branches, barriers, the uniform datapath.
_ELSEWHERE = {
    *("BRA", "BRX", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "BAR", "MEMBAR", "ERRBAR", "CCTL"),
    *("DEPBAR", "LDGDEPBAR", "NANOSLEEP", "YIELD", "R2UR", "ULDC", "UMOV", "VOTEU", "S2UR", "ACQBULK", "PREEXIT"),
    *("JMP", "KILL", "RPCMOV", "BMOV", "CS2R", "UCGABAR_ARV", "UCGABAR_WAIT", "VOTE"),
}
_WIDTHS = {"128": 4, "64": 2}
_WAITED = {"LDG", "ATOM", "ATOMG", "LD"}
_OF_MATRIX = {"HMMA"}


def wavefronts(one: Instruction) -> float:
    """Clocks of an access by 32 lanes on a path of 128 bytes a clock."""
    words = one.opcode.split(".")
    if one.name in ("LDSM", "STSM"):
        return float(words[-1]) if words[-1].isdigit() else 1.0
    if one.name not in ("LDG", "STG", "LDS", "STS", "LDGSTS", "LD", "ST", "ATOM", "ATOMG", "RED"):
        return 0.0
    return float(next((_WIDTHS[word] for word in words[::-1] if word in _WIDTHS), 1))


def counters(path: Sequence[Instruction]) -> Counters:
    """Count the instructions on a path, by unit."""
    fma = alu = special = memory = fronts = tensor = 0.0
    for one in path:
        if one.idle:  # it takes an issue slot and nothing else
            continue
        if one.name in _OF_MATRIX:
            tensor += 1.0
        elif one.name in _FMA:
            fma += 1.0
        elif one.name in _SPECIAL:
            special += 1.0
        elif one.name in _MEMORY:
            memory += 1.0
            fronts += wavefronts(one)
        elif one.name not in _ELSEWHERE and not one.name.startswith("U"):
            alu += 1.0
    return Counters(float(len(path)), fma, alu, special, memory, fronts, tensor, trips(path))


def trips(path: Sequence[Instruction]) -> float:
    """Count the waits of a path for global memory: at the first use of a loaded register all loads before it arrive."""
    waiting: set[int] = set()
    found = 0
    for one in path:
        if waiting & _registers(one):
            found += 1
            waiting.clear()
        if one.name in _WAITED:
            first = re.match(r"\s*(?:U?P\w+\s*,\s*)?R(\d+)", one.operands)
            if first:
                words = next((_WIDTHS[word] for word in one.opcode.split(".") if word in _WIDTHS), 1)
                waiting |= set(range(int(first[1]), int(first[1]) + words))
    return float(found + bool(waiting))


def _registers(one: Instruction) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", one.operands)}


def way(
    flow: Flow, first: int, last: int | None, score: Score, left_out: Sequence[Loop] = (), ends: bool = True
) -> list[Instruction]:
    """Return the best-scoring forward path.

    Args:
        first, last: blocks at which it begins and ends; last=None: where the function ends.
        score: of an instruction; scores of a path are added, and compared as tuples.
        left_out: loops whose instructions count nothing; the path passes through them.
        ends: whether the last block's own instructions belong to it.

    Raises:
        PartMissing: there is no such path.
    """
    stop = len(flow.blocks) - 1 if last is None else last
    best: dict[int, tuple[tuple[float, ...], list[int]]] = {}
    scores = [[score(one) for one in block] for block in flow.blocks[first : stop + 1]]
    zero = tuple(0.0 for _ in score(flow.blocks[first][0]))
    for number in range(stop, first - 1, -1):
        end, own = number, tuple(map(sum, zip(zero, *scores[number - first], strict=True)))
        ahead, kept = set(flow.next[number]), [number]
        for loop in left_out:
            if loop.first <= number <= loop.last:
                end, own, kept = loop.last, zero, []
                ahead = {to for block in range(loop.first, loop.last + 1) for to in flow.next[block]}
        if number == last or (last is None and not flow.next[number]):
            best[number] = own, kept
            continue
        rests = [best[to] for to in ahead if end < to <= stop and to in best]
        if not rests:
            continue
        rest = max(rests, key=lambda found: found[0])
        best[number] = tuple(map(sum, zip(own, rest[0], strict=True))), kept + rest[1]
    if first not in best:
        raise PartMissing(f"no way from block {first} to block {last}")
    numbers = best[first][1]
    if not ends and numbers and numbers[-1] == last:
        numbers = numbers[:-1]
    return [one for number in numbers for one in flow.blocks[number]]


def _is_access(one: Instruction) -> float:
    return float(one.name in ("LDG", "STG", "LDS", "STS", "LDSM", "LDGSTS", "HMMA") and not one.idle)


def longest(one: Instruction) -> tuple[float, ...]:
    """Score for the way with swish, or with the most work: MUFU.TANH, in float32 its reciprocals; every access.

    Calls are avoided: a division makes one for operands that are denormal or infinite.
    """
    return (
        float(one.opcode == "MUFU.TANH"),
        float(one.opcode == "MUFU.RCP"),
        _is_access(one),
        -float(one.name in ("FFMA", "FMUL", "CALL")),
        1.0,
    )


def plain(one: Instruction) -> tuple[float, ...]:
    """Score for the way without special functions: every access, the fewest instructions."""
    return -float(one.name == "MUFU"), _is_access(one), -1.0


def with_norm(one: Instruction) -> tuple[float, ...]:
    """Score for the way through a norm's parameters: a batch norm with all of them, and a bias of the convolution."""
    return float(one.opcode == "MUFU.RSQ"), _is_access(one), 1.0


def around(flow: Flow, loop: Loop, left_out: Sequence[Loop] = (), score: Score = longest) -> Counters:
    """Count one pass through a loop."""
    return counters(way(flow, loop.first, loop.last, score, left_out))

"""The way of a warp through a function, and what stands on it, by the unit that executes it."""

from __future__ import annotations

import pytest

from benchmarks.kernel_economy import paths
from benchmarks.kernel_economy.loops import Flow, instructions_of
from effkernels.plan.kernel_counts import Counters


def listing(*lines: str) -> str:
    """A disassembly of these instructions, at 0x10, 0x20 and so on."""
    return "".join(f"        /*{16 * (number + 1):04x}*/  {line} ;  /* 0x0 */\n" for number, line in enumerate(lines))


# A loop over two strips of 1 pixel by 1 channel, each with a row loop of one load and one product.
LISTING = (
    "MOV R0, 0x1",  # 10: before the loops
    "IADD3 R1, R1, 0x1, RZ",  # 20: the loop over strips
    "@P0 BRA 0x60",
    "LDG.E.128 R4, [R2.64]",  # 40: a row inside
    "FFMA R4, R4, R5, R6",
    "@P1 BRA 0x40",  # 60, where a strip at the border comes in as well
    "ISETP.GE.AND P2, PT, R1, R2, PT",  # 70: a row at the border
    "LDG.E.128 R4, [R2.64]",
    "FFMA R4, R4, R5, R6",
    "@P1 BRA 0x70",
    "BRX R8 -0x10",  # b0: the switch of the activation
    "MUFU.EX2 R4, R4",  # c0: not swish, longer
    "FMUL R4, R4, R4",
    "FMUL R4, R4, R4",
    "BRA 0x120",
    "MUFU.TANH R4, R4",  # 100: swish
    "BRA 0x120",
    "STG.E.128 [R2.64], R4",  # 120
    "@!P3 BRA 0x20",
    "EXIT",
)


class TestThePaths:
    FLOW = Flow(instructions_of(listing(*LISTING)))

    def block(self, address: int) -> int:
        return next(number for number, block in enumerate(self.FLOW.blocks) if block[0].address == address)

    def test_swish_is_preferred_or_avoided(self) -> None:
        first, last = self.block(0xB0), self.block(0x120)
        assert "MUFU.TANH" in [one.opcode for one in paths.way(self.FLOW, first, last, paths.longest)]
        listing_without = [line.replace("MUFU.TANH", "FADD") for line in LISTING]
        flow = Flow(instructions_of(listing(*listing_without)))
        assert "MUFU.EX2" not in [one.opcode for one in paths.way(flow, first, last, paths.plain)]

    def test_loops_left_out_count_nothing(self) -> None:
        loops = paths.loops_of(self.FLOW)
        rows = [one for one in loops if one.count("FFMA") == 1]
        strips = next(one for one in loops if all(paths.inside(row, one) for row in rows))
        path = paths.way(self.FLOW, strips.first, strips.last, paths.longest, rows)
        assert not [one for one in path if one.name == "FFMA"]
        assert [one.name for one in path] == ["IADD3", "BRA", "BRX", "MUFU", "BRA", "STG", "BRA"]

    def test_no_way_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no way from block"):
            paths.way(self.FLOW, self.block(0x140), self.block(0x20), paths.longest)

    def test_instructions_are_sorted_by_unit(self) -> None:
        code = instructions_of(
            listing(
                "FFMA R1, R2, R3, R4",
                "HMMA.16816.F32.BF16 R4, R8, R12, R4",
                "LDS.128 R4, [R8]",
                "MUFU.TANH R1, R1",
                "LDSM.16.M88.4 R4, [R8]",
                "PRMT R1, R2, 0x1, R3",
                "UIADD3 UR4, UR4, 0x1, URZ",
                "BAR.SYNC 0x0",
                "STG.E.64 [R2.64], R4",
                "EXIT",
            )
        )
        found = paths.counters(code)
        assert found == Counters(issued=10, fma=1, alu=1, special=1, memory=3, wavefronts=4 + 4 + 2, tensor=1, trips=0)

    def test_loads_before_a_first_use_are_one_trip(self) -> None:
        code = instructions_of(
            listing("LDG.E.128 R4, [R2.64]", "LDG.E R8, [R2.64]", "FADD R1, R1, R7", "FADD R1, R1, R8",
                    "LDG.E R9, [R2.64]", "MOV R1, R2", "EXIT")
        )  # fmt: skip
        assert paths.trips(code) == 2  # the third load arrives after the path

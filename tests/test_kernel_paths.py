"""The way of a warp through a function, and what stands on it, by the unit that executes it."""

from __future__ import annotations

import pytest
from listings import STRIPS, listing

from benchmarks.kernel_economy import paths
from benchmarks.kernel_economy.loops import Flow, PartMissing, inside, instructions_of, loops_of
from effkernels.plan.kernel_counts import Counters


class TestThePaths:
    FLOW = Flow(instructions_of(listing(*STRIPS)))

    def block(self, address: int) -> int:
        return next(number for number, block in enumerate(self.FLOW.blocks) if block[0].address == address)

    def test_swish_is_preferred_or_avoided(self) -> None:
        first, last = self.block(0xB0), self.block(0x120)
        assert "MUFU.TANH" in [one.opcode for one in paths.way(self.FLOW, first, last, paths.longest)]
        listing_without = [line.replace("MUFU.TANH", "FADD") for line in STRIPS]
        flow = Flow(instructions_of(listing(*listing_without)))
        assert "MUFU.EX2" not in [one.opcode for one in paths.way(flow, first, last, paths.plain)]

    def test_loops_left_out_count_nothing(self) -> None:
        loops = loops_of(self.FLOW)
        rows = [one for one in loops if one.count("FFMA") == 1]
        strips = next(one for one in loops if all(inside(row, one) for row in rows))
        path = paths.way(self.FLOW, strips.first, strips.last, paths.longest, rows)
        assert not [one for one in path if one.name == "FFMA"]
        assert [one.name for one in path] == ["IADD3", "BRA", "BRX", "MUFU", "BRA", "STG", "BRA"]

    def test_no_way_is_an_error(self) -> None:
        with pytest.raises(PartMissing, match="no way from block"):
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

    def test_what_is_never_executed_takes_an_issue_slot_alone(self) -> None:
        code = instructions_of(listing("@!PT LDS RZ, [RZ]", "LDGSTS.E.BYPASS.128 [R3], [R2.64]"))
        assert paths.counters(code) == Counters(issued=2, memory=1, wavefronts=4)

    def test_loads_before_a_first_use_are_one_trip(self) -> None:
        code = instructions_of(
            listing("LDG.E.128 R4, [R2.64]", "LDG.E R8, [R2.64]", "FADD R1, R1, R7", "FADD R1, R1, R8",
                    "LDG.E R9, [R2.64]", "MOV R1, R2", "EXIT")
        )  # fmt: skip
        assert paths.trips(code) == 2  # the third load arrives after the path

"""The reading and the comparison of instruction counts, on recorded text: no tool runs."""

from __future__ import annotations

import pytest

from benchmarks.instruction_counts import counting
from benchmarks.instruction_counts.table import Table, differences, grown

DUMP = """# callgrind format
version: 1
creator: callgrind-3.19.0
pid: 4711
cmd:  build/cmake/count_instructions avx2
part: 2

desc: I1 cache:
desc: Trigger: --dump-after=counted_call

positions: line
events: Ir
summary: 1203344

ob=(1)
fl=(1)
fn=(1)
15 12
totals: 1203344
"""

PERF = """# started on Sun Nov 29 20:00:00 2026

21547863,,instructions:u,4711832,100.00,,
"""

TABLE = Table("GNU 12.2.0", {("avx2", "stem 3->32 @56 float32"): 1000, ("plain", "a, b"): 4000})


def test_the_total_of_a_dump_is_read() -> None:
    assert counting.total_of(DUMP) == 1203344
    with pytest.raises(ValueError, match="neither"):
        counting.total_of("events: Ir\n")


def test_the_count_of_perf_is_read() -> None:
    assert counting.instructions_of(PERF) == 21547863
    with pytest.raises(ValueError, match="counted no instructions"):
        counting.instructions_of("<not supported>,,instructions:u,0,100.00,,\n")


def test_a_table_is_read_as_it_was_written() -> None:
    assert Table.from_text(TABLE.to_text()) == TABLE
    with pytest.raises(ValueError, match="--write"):
        Table.from_text("stem,12\n")


def test_more_than_three_per_cent_is_an_error() -> None:
    """Fewer instructions are none, and neither is an instruction set that was not counted."""
    case = ("avx2", "stem 3->32 @56 float32")
    assert grown(TABLE.counts, {case: 1030}) == []
    assert grown(TABLE.counts, {case: 500}) == []
    (line,) = grown(TABLE.counts, {case: 1031})
    assert "1031" in line
    assert "+3.1%" in line


def test_cases_without_a_counterpart_are_errors() -> None:
    lines = grown(TABLE.counts, {("avx2", "new"): 1})
    assert len(lines) == 2
    assert all("--write" in line for line in lines)


def test_differences_are_in_per_cent() -> None:
    assert differences(TABLE.counts, {("plain", "a, b"): 3000})[0].endswith("-25.0%")
    assert differences({}, {("plain", "a, b"): 3000})[0].endswith("new")

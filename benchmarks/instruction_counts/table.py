"""The committed table of counts, and what has changed since."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

ALLOWED_GROWTH = 0.03
"""Above it a count is an error: another order of instructions moves the counts by less."""

Counts = Mapping[tuple[str, str], int]
"""Instructions by instruction set and case."""


@dataclass(frozen=True)
class Table:
    """Counts, and the compiler whose code was counted: those of two compilers cannot be compared."""

    compiler: str
    counts: Counts

    def to_text(self) -> str:
        """Return the table as it is committed."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["compiler", self.compiler, ""])
        writer.writerow(["instruction_set", "case", "instructions"])
        writer.writerows([isa, case, count] for (isa, case), count in self.counts.items())
        return text.getvalue()

    @staticmethod
    def from_text(text: str) -> Table:
        """Return the table that was written."""
        rows = list(csv.reader(io.StringIO(text)))
        if len(rows) < 2 or rows[0][:1] != ["compiler"] or rows[1] != ["instruction_set", "case", "instructions"]:
            raise ValueError("this is no table of instruction counts; write one with --write")
        return Table(rows[0][1], {(isa, case): int(count) for isa, case, count in rows[2:]})


def grown(before: Counts, now: Counts) -> list[str]:
    """Return a line for each count that grew by more than is allowed, or has no counterpart."""
    lines = []
    for (isa, case), count in now.items():
        old = before.get((isa, case))
        if old is None:
            lines.append(f"{isa}, {case}: {count} instructions, and the table has none; renew it with --write")
        elif count > old * (1 + ALLOWED_GROWTH):
            lines.append(f"{isa}, {case}: {count} instructions, {count / old - 1:+.1%} of {old}")
    counted = {isa for isa, _ in now}
    for isa, case in before:
        if isa in counted and (isa, case) not in now:
            lines.append(f"{isa}, {case}: in the table, and no longer a case; renew it with --write")
    return lines


def differences(before: Counts, now: Counts) -> list[str]:
    """Return a line for each case: its count, and the change in per cent."""
    lines = []
    for (isa, case), count in now.items():
        old = before.get((isa, case))
        lines.append(f"{isa:6} {case:42} {count:12,}" + (f" {count / old - 1:+7.1%}" if old else "     new"))
    return lines

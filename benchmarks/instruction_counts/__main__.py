"""``python -m benchmarks.instruction_counts``: print the counts beside the table's; ``--check``, ``--write``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.instruction_counts import counting
from benchmarks.instruction_counts.counting import CannotCount
from benchmarks.instruction_counts.table import ALLOWED_GROWTH, Table, differences, grown

TABLE = Path(__file__).with_name("counts.csv")
INSTRUCTION_SETS = ("avx2", "plain")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instruction_counts", description=__doc__)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help=f"fail if a count grew by over {ALLOWED_GROWTH:.0%}%")
    choice.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--isa", nargs="+", choices=INSTRUCTION_SETS, default=list(INSTRUCTION_SETS))
    options = parser.parse_args()
    try:
        count = counting.pick_counter()
        driver = counting.build_driver()
        counts = {(isa, case): n for isa in options.isa for case, n in count(driver, isa).items()}
    except CannotCount as error:
        print(f"instructions cannot be counted here: {error}")
        return 0
    compiler = json.loads((counting.CMAKE_TREE / "build_info.json").read_text())["compiler"]
    old = Table.from_text(TABLE.read_text()) if TABLE.exists() else Table(compiler, {})
    print("\n".join(differences(old.counts, counts)))
    if options.write:
        kept = {key: n for key, n in old.counts.items() if key[0] not in options.isa}
        TABLE.write_text(Table(compiler, {**counts, **kept}).to_text())
        return 0
    if old.compiler != compiler:
        print(f"the table is of {old.compiler} and this library of {compiler}: their counts cannot be compared")
        return 0
    errors = grown(old.counts, counts)
    if options.check and errors:
        print("\nMore instructions than before:", *errors, sep="\n", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

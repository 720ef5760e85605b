"""``effkernels compare``: two files of benchmark results, for continuous integration."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from effkernels import console
from effkernels.bench.compare import LEAST_CHANGE, Comparison, Difference, Verdict, compare
from effkernels.bench.timing import Row, read_rows
from effkernels.commands.common import UsageError, add_json
from effkernels.files import printable

TEXT = "Compare two files of benchmark results; the exit status is 1 if something became slower by more than noise."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("before", metavar="A.jsonl", help="rows of `bench --results-file`")
    parser.add_argument("after", metavar="B.jsonl", help="rows that are compared with them")
    parser.add_argument(
        "--least-change", type=_share, default=LEAST_CHANGE, metavar="PERCENT",
        help=f"a smaller change never counts; default: {100 * LEAST_CHANGE:g}",
    )  # fmt: skip
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare two files of results."""
    before, after = _rows(arguments.before), _rows(arguments.after)
    found = compare(before, after, least_change=arguments.least_change)
    if not found.differences:
        raise UsageError(f"no row of {arguments.after} has the case and the contender of a row of {arguments.before}")
    if arguments.json:
        print(json.dumps(_report(found), indent=2))
    else:
        title = f"{arguments.before} ({_origin(before)}) and {arguments.after} ({_origin(after)}): medians of a call"
        console.table(title, *_table(found.differences))
        _print_meaning(found)
    for name, rows in ((arguments.before, found.only_before), (arguments.after, found.only_after)):
        for row in rows:
            console.note(f"compare: only in {name}: {_title(row)}: {row.contender}")
    return 1 if found.having(Verdict.SLOWER) else 0


def _rows(name: str) -> list[Row]:
    try:
        rows = read_rows(Path(name))
    except OSError as error:
        raise UsageError(f"{printable(name)}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not rows:
        raise UsageError(f"{name}: no rows")
    return rows


def _origin(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row.date)
    source = "an installed package" if newest.commit is None else newest.commit[:10]
    return f"{source}{' with changes' if newest.dirty else ''}, {newest.date[:10]}"


def _title(row: Row) -> str:
    part = f" {row.part}" if row.part else ""
    return f"{row.suite} {row.case}{part}, {row.dtype}, batch {row.batch}"


def _table(differences: Sequence[Difference]) -> tuple[list[str], list[list[str]]]:
    cells = []
    for difference in differences:
        verdict = difference.verdict
        cells.append(
            [
                _title(difference.before),
                difference.before.contender,
                f"{difference.before.median_us:.1f}",
                f"{difference.after.median_us:.1f}",
                f"{1 + difference.change:.3f}",
                "-" if difference.bound is None else f"{difference.bound:.3f}",
                {Verdict.SLOWER: "SLOWER", Verdict.FASTER: "faster", Verdict.UNKNOWN: "no spread"}.get(verdict, ""),
            ]
        )
    return ["case", "contender", "A us", "B us", "B / A", "noise to", ""], cells


def _print_meaning(found: Comparison) -> None:
    counts = {verdict: len(found.having(verdict)) for verdict in Verdict}
    print(
        f"{counts[Verdict.SLOWER]} slower and {counts[Verdict.FASTER]} faster by more than noise, "
        f"{counts[Verdict.NOISE]} within it"
        + (f", {counts[Verdict.UNKNOWN]} rows say nothing of their rounds" if counts[Verdict.UNKNOWN] else "")
    )
    if not found.same_device:
        print("The files are of different devices: noise is that of the rounds alone.")


def _report(found: Comparison) -> dict[str, object]:
    def key(row: Row) -> dict[str, object]:
        return {name: getattr(row, name) for name in ("suite", "case", "part", "dtype", "batch", "contender", "device")}

    return {
        "differences": [
            {
                **key(difference.before),
                "before_us": difference.before.median_us,
                "after_us": difference.after.median_us,
                "change": round(difference.change, 4),
                "noise": None if difference.noise is None else round(difference.noise, 4),
                "verdict": difference.verdict.value,
            }
            for difference in found.differences
        ],
        "only_before": [key(row) for row in found.only_before],
        "only_after": [key(row) for row in found.only_after],
        "same_device": found.same_device,
    }


def _share(text: str) -> float:
    """Parse a percentage as a share."""
    try:
        value = float(text) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage of at least 0")
    return value

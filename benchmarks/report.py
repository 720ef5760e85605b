"""Makes tables and pictures of the results: ``python -m benchmarks.report``.

Writes results/REPORT.md and its pictures, and puts the newest tables of the networks between the markers of README.md.
Of each case only the newest run counts, and ratios are formed inside that run alone. ``--check`` writes nothing and
fails where a file is not up to date. ``--measure`` first measures this machine's CPU, by `effkernels bench`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.sections import Section
from effkernels import console, environment
from effkernels.bench.timing import read_rows
from effkernels.cli import main as effkernels
from effkernels.report import measured
from effkernels.report.measured import Group, newest_groups, origin_of, time_text
from effkernels.report.parts import Picture
from effkernels.report.svg import standalone

RESULTS = Path(__file__).resolve().parent / "results"
README = RESULTS.parent.parent / "README.md"
MEASURED = (
    "--model efficientnet_b0 efficientnet_b4 --batch-size 1 16 --no-memory --rounds 8 "
    "--contender effkernels engine optimized eager eager-channels-last compile onnxruntime openvino",
    "--model efficientnet_b0 efficientnet_b4 --batch-size 1 16 --precision bfloat16 --no-memory --rounds 8 "
    "--contender effkernels engine optimized eager eager-channels-last compile openvino",  # ONNX Runtime has none
    "--suite layer --model efficientnet_b0 --batch-size 1 16 --contender effkernels eager-channels-last",
    "--suite overhead",
)
"""The flags of each call of `effkernels bench` that makes a part of a CPU's report, what matters most first."""
SECTION = Section("README.md", "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->")
_FAMILY = "efficientnet_"


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """Return the pictures of one suite on one device: the ratios of all cases, and the suite's own."""
    title = measured.SUITE_TITLES.get(groups[0].suite, groups[0].suite)
    return [measured.ratios(groups, title), *measured.pictures(groups)]


def _suites(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups of each device and suite."""
    found: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        found.setdefault((group.device, group.suite), []).append(group)
    return list(found.values())


def report(groups: Sequence[Group]) -> str:
    """REPORT.md: every case of every device and suite."""
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/report.py` from the rows in this folder. All contenders of a table ran in turns in one",
        "process with the same weights; times of different tables are not comparable. Peak memory is the growth of the",
        "resident set during a call (CPU), or the most that PyTorch's allocator had handed out (GPU), in a process of",
        "its own per contender; what a recorded engine holds is there before the call. The relative error is that of",
        "the logits (or results) against float64.",
    ]
    together = measured.side_by_side(groups)
    if together:
        lines += ["", "## Machines side by side"]
    for table in together:
        lines += ["", f"#### {table.title}", "", *table.markdown()]
    for device in dict.fromkeys(group.device for group in groups):
        lines += ["", f"## {device}"]
        for members in _suites([group for group in groups if group.device == device]):
            lines += ["", f"### {measured.SUITE_TITLES.get(members[0].suite, members[0].suite)}"]
            for picture in pictures(members):
                lines += ["", f"![{picture.title}]({picture.name}.svg)"]
            for table in measured.tables(members):
                lines += ["", f"#### {table.title}", "", *table.markdown()]
            lines += ["", origin_of([row for group in members for row in group.rows])]
    return "\n".join(lines) + "\n"


def _short(case: str) -> str:
    """'B0 at 224' for 'efficientnet_b0@224': with the long names the table is wider than a page on GitHub."""
    name, _, size = case.partition("@")
    return f"{name.removeprefix(_FAMILY).upper()} at {size}" if name.startswith(_FAMILY) else case


def _order(case: tuple[str, str, int]) -> tuple[str, bool, str, int]:
    """Sort by network, float32 first, then by batch."""
    name, dtype, batch = case
    return name, dtype != "float32", dtype, batch


def _machines(models: Sequence[Group]) -> list[list[str]]:
    """Return the devices that share a table: those with a case in common."""
    cases: dict[str, set[str]] = {}
    for group in models:
        cases.setdefault(group.device, set()).add(group.title)
    found: list[list[str]] = []
    for device, own in cases.items():
        shared = next((devices for devices in found if own & cases[devices[0]]), None)
        if shared is None:
            found.append([device])
        else:
            shared.append(device)
    return found


def _cell(times: Sequence[float | None]) -> str:
    """Return the time of a call on each machine, '4.83 / 7.70 ms', with '-' where there is none."""
    known = [us for us in times if us is not None]
    if not known:
        return "-"
    if len(times) == 1:
        return time_text(known[0])
    return " / ".join("-" if us is None else f"{us / 1e3:.2f}" for us in times) + " ms"


def readme_section(groups: Sequence[Group]) -> str:
    """Return the tables between the markers of README.md: a line per network and a column per contender.

    Machines that ran the same networks are side by side in one table.
    """
    blocks = []
    models = [group for group in groups if group.suite == "model"]
    for devices in _machines(models):
        members = [group for group in models if group.device in devices]
        times = {
            (group.device, group.case, group.dtype, group.batch, row.contender): row.median_us
            for group in members
            for row in group.rows
        }
        contenders = list(dict.fromkeys(row.contender for group in members for row in group.rows))
        cases = sorted(dict.fromkeys((group.case, group.dtype, group.batch) for group in members), key=_order)
        what = "EfficientNet on " if any(_short(case) != case for case, _, _ in cases) else ""
        lines = [f"{what}{' / '.join(devices)}, median time of a call:", "", "| | " + " | ".join(contenders) + " |"]
        lines.append("|---|" + "--:|" * len(contenders))
        for case, dtype, batch in cases:
            cells = [_cell([times.get((device, case, dtype, batch, one)) for device in devices]) for one in contenders]
            lines.append(f"| {_short(case)}, {dtype}, batch {batch} | " + " | ".join(cells) + " |")
        for device in devices:
            source = origin_of([row for group in members if group.device == device for row in group.rows])
            lines += ["", f"Measured {source}" if len(devices) == 1 else f"{device}: measured {source}"]
        blocks.append("\n".join(lines))
    return (
        "\n\n".join(blocks) if blocks else "No results have been recorded yet: `python -m benchmarks.report --measure`."
    )


def measure(folder: Path) -> int:
    """Measure the cases of the report on this machine's CPU and append the rows to its file in a folder.

    Cases that the file has of this very commit are not measured again, so that a run that was broken off goes on.

    Returns:
        The number of calls of `effkernels bench` that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = environment.device_name(torch.device("cpu"), torch.get_num_threads())
    file = folder / f"{environment.file_stem(device)}.jsonl"
    begin, failed = time.monotonic(), 0
    for flags in MEASURED:
        console.note(f"report: effkernels bench {flags}")
        failed += effkernels(["bench", *flags.split(), "--device", "cpu", "--resume", str(file)]) != 0
    console.note(f"report: measured in {(time.monotonic() - begin) / 60:.1f} minutes")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, the pictures and the README's tables; or check that all are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results-folder", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--readme", type=Path, default=README, help="default: README.md of the repository")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing, fail where a file is out of date")
    what.add_argument("--measure", action="store_true", help="measure this CPU first, on an otherwise idle machine")
    parsed = parser.parse_args(arguments)
    folder: Path = parsed.results_folder
    failed = measure(folder) if parsed.measure else 0
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file)]
    groups = newest_groups(rows)
    readme = parsed.readme.read_text(encoding="utf-8")
    texts = {folder / "REPORT.md": report(groups), parsed.readme: SECTION.replaced(readme, readme_section(groups))}
    for members in _suites(groups):
        texts |= {folder / f"{picture.name}.svg": standalone(picture.svg) for picture in pictures(members)}
    if parsed.check:
        stale = [file for file, text in texts.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
        for file in stale:
            print(f"{file} is out of date: python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

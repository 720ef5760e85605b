"""Makes tables and plots of the results: ``python -m benchmarks.report``.

Writes results/REPORT.md and a PNG per device and suite, and puts the newest tables of the networks between the markers
of README.md. Of each case only the newest run counts, and ratios are formed inside that run alone. ``--check`` writes
nothing and fails where a file is not up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sections import Section
from benchmarks.suite import RESULTS
from effkernels import environment
from effkernels.bench.timing import Row, read_rows

README = RESULTS.parent.parent / "README.md"
SECTION = Section("README.md", "<!-- results: written by benchmarks/report.py -->", "<!-- end of results -->")
_FAMILY = "efficientnet_"
_SUITE_TITLES = {
    "model": "Networks",
    "block": "Blocks",
    "op": "Operators",
    "training": "Fine-tuning with frozen norms, forward and backward",
    "overhead": "Cost of one call with next to no work",
}


@dataclass(frozen=True)
class Group:
    """The rows of one case from its newest run, in the order they were measured."""

    device: str
    suite: str
    case: str
    dtype: str
    batch: int
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        return f"{self.case}, {self.dtype}, batch {self.batch}"

    @property
    def base(self) -> Row:
        """The row that times are related to: this package's where there is one."""
        return next((row for row in self.rows if row.contender.startswith("effkernels")), self.rows[0])


def newest_groups(rows: Sequence[Row]) -> list[Group]:
    """Rows by case, in the order of their first appearance; of each case those of the newest run."""
    by_case: dict[tuple[str, str, str, str, int], list[Row]] = {}
    for row in rows:
        by_case.setdefault((row.device, row.suite, row.case, row.dtype, row.batch), []).append(row)
    groups = []
    for key, members in by_case.items():
        newest = max(row.date for row in members)
        groups.append(Group(*key, tuple(row for row in members if row.date == newest)))
    return groups


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


def group_table(group: Group) -> list[str]:
    """Return a Markdown table of one case."""
    base = group.base
    lines = [
        f"| contender | median | p95 | p99 | images/s | peak MB | relative error | time / {base.contender} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in group.rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        error = "" if row.rel_error is None else f"{row.rel_error:.1e}"
        cells = [
            row.contender, _time(row.median_us), _time(row.p95_us), _time(row.p99_us), f"{row.images_per_s:,.0f}",
            peak, error, f"{row.median_us / base.median_us:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def origin(rows: Sequence[Row]) -> str:
    """Return when, from which commit and with which versions rows were measured, in one line."""
    sources = []
    for row in rows:
        source = "an installed package" if row.commit is None else f"commit {row.commit[:10]}"
        sources.append(f"{row.date[:10]}, {source}{' with changes' if row.dirty else ''}")
    versions: dict[str, str] = {}
    for member in rows:
        versions.update({name: version for name, version in member.versions.items() if version})
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{'; '.join(dict.fromkeys(sources))}; {listed}."


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
    for device in dict.fromkeys(group.device for group in groups):
        lines += ["", f"## {device}"]
        for suite in dict.fromkeys(group.suite for group in groups if group.device == device):
            members = [group for group in groups if (group.device, group.suite) == (device, suite)]
            lines += ["", f"### {_SUITE_TITLES.get(suite, suite)}", "", f"![{suite}]({plot_name(device, suite)})"]
            for group in members:
                lines += ["", f"#### {group.title}", "", *group_table(group), "", origin(group.rows)]
    return "\n".join(lines) + "\n"


def plot_name(device: str, suite: str) -> str:
    """File name of the plot of a suite on a device."""
    return f"{environment.file_stem(device)}-{suite}.png"


def plot(groups: Sequence[Group], file: Path) -> None:
    """Bars of the time of every contender relative to this package, one block per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = sum(len(group.rows) for group in groups)
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.24 * bars + 0.42 * len(groups)), layout="constrained")
    contenders = list(dict.fromkeys(row.contender for group in groups for row in group.rows))
    colours = {name: f"C{index % 10}" for index, name in enumerate(contenders)}
    position = 0.0
    for group in groups:
        axes.text(0, position, group.title, fontsize=8, fontweight="bold", va="center")
        position += 1
        for row in group.rows:
            ratio = row.median_us / group.base.median_us
            axes.barh(position, ratio, color=colours[row.contender])
            axes.text(ratio, position, f" {row.contender}, {_time(row.median_us)}", fontsize=7, va="center")
            position += 1
        position += 0.5
    axes.set_ylim(position, -1)
    axes.set_yticks([])
    axes.margins(x=0.25)
    axes.axvline(1, color="0.5", linewidth=0.8)
    axes.set_xlabel(f"time relative to {groups[0].base.contender} (less is faster)")
    axes.set_title(groups[0].device, fontsize=9)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _short(case: str) -> str:
    """'B0 at 224' for 'efficientnet_b0@224': with the long names the table is wider than a page on GitHub."""
    name, _, size = case.partition("@")
    return f"{name.removeprefix(_FAMILY).upper()} at {size}" if name.startswith(_FAMILY) else case


def readme_section(groups: Sequence[Group]) -> str:
    """Return the table between the markers of README.md: the networks, a line per contender and a column per case."""
    blocks = []
    models = [group for group in groups if group.suite == "model"]
    for device in dict.fromkeys(group.device for group in models):
        members = [group for group in models if group.device == device]
        contenders = list(dict.fromkeys(row.contender for group in members for row in group.rows))
        titles = [f"{_short(group.case)}, {group.dtype}, batch {group.batch}" for group in members]
        what = "EfficientNet on " if any(_short(group.case) != group.case for group in members) else ""
        lines = [f"{what}{device}, median time of a call:", "", "| | " + " | ".join(titles) + " |"]
        lines.append("|---|" + "--:|" * len(members))
        for contender in contenders:
            cells = []
            for group in members:
                row = next((row for row in group.rows if row.contender == contender), None)
                cells.append("" if row is None else _time(row.median_us))
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
        lines += ["", "Measured " + origin([row for group in members for row in group.rows])]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) if blocks else "No results have been recorded yet: `python -m benchmarks.suite`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report, the plots and the README's tables; or check that the texts are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results-folder", type=Path, default=RESULTS, help="default: benchmarks/results")
    parser.add_argument("--readme", type=Path, default=README, help="default: README.md of the repository")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a text is out of date")
    parsed = parser.parse_args(arguments)
    folder: Path = parsed.results_folder
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_rows(file)]
    groups = newest_groups(rows)
    readme = parsed.readme.read_text(encoding="utf-8")
    texts = {folder / "REPORT.md": report(groups), parsed.readme: SECTION.replaced(readme, readme_section(groups))}
    if parsed.check:
        stale = [file for file, text in texts.items() if not file.exists() or file.read_text(encoding="utf-8") != text]
        for file in stale:
            print(f"{file} is out of date: python -m benchmarks.report", file=sys.stderr)
        return 1 if stale else 0
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    for device, suite in dict.fromkeys((group.device, group.suite) for group in groups):
        members = [group for group in groups if (group.device, group.suite) == (device, suite)]
        plot(members, folder / plot_name(device, suite))
    return 0


if __name__ == "__main__":
    sys.exit(main())

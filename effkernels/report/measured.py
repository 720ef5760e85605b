"""Tables and pictures of measured rows, as `effkernels bench` writes them.

Of each case only the newest run counts, and ratios are formed inside that run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effkernels import environment
from effkernels.bench import kernelbench, paper_cases
from effkernels.bench.timing import Row
from effkernels.report import charts
from effkernels.report.charts import Ceiling, Point
from effkernels.report.page import Page
from effkernels.report.parts import Origin, Picture, Table

SUITE_TITLES = {
    "model": "Networks",
    "latency": "Networks, one image a call, each call waited for",
    "layer": "Time by layer",
    "block": "Blocks",
    "op": "Operators",
    "train": "Training steps",
    "kernelbench": "KernelBench's problems",
    "paper": "Table 4 of the EfficientNet paper, one core",
    "training": "Fine-tuning with frozen norms, forward and backward",
    "overhead": "Cost of one call with next to no work",
}
# Suites whose cases are many and small: they share a table.
_SMALL = ("op", "block", "kernelbench")


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
    def wholes(self) -> tuple[Row, ...]:
        """The rows of the whole case, without those of its parts."""
        return tuple(row for row in self.rows if row.part is None)

    @property
    def base(self) -> Row:
        """The row that times are related to: this package's where there is one."""
        return next((row for row in self.wholes if row.contender.startswith("effkernels")), self.wholes[0])


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


def origin_of(rows: Sequence[Row]) -> str:
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


def time_text(us: float) -> str:
    """Return a time with its unit."""
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


# ------------------------------------------------------------------------------------------------------- tables


def case_table(group: Group) -> Table:
    """Return the table of one case: a line for each contender."""
    base, cells = group.base, []
    for row in group.wholes:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        error = "" if row.rel_error is None else f"{row.rel_error:.1e}"
        cells.append(
            [
                row.contender, time_text(row.median_us), time_text(row.p95_us), time_text(row.p99_us),
                f"{row.images_per_s:,.0f}", peak, error, f"{row.median_us / base.median_us:.2f}",
            ]
        )  # fmt: skip
    columns = ["contender", "median", "p95", "p99", "images/s", "peak MB", "relative error", f"time / {base.contender}"]
    return Table(group.title, columns, cells, Origin.MEASURED, _belief(group.rows))


def _belief(rows: Sequence[Row]) -> str:
    """Return how far times can be believed, in one line; "" of rows that do not say it."""
    spreads = [row.spread for row in rows if row.spread is not None and row.part is None]
    words = [f"Medians of rounds differ by up to {max(spreads):.1%}."] if spreads else []
    if any(row.steady is False for row in rows):
        words.append("The machine's own speed changed during the case: believe its ratios more than its times.")
    throttled = dict.fromkeys(reason for row in rows for reason in (row.machine or {}).get("throttled", ()))
    if throttled:
        words.append(f"The clock was held back: {', '.join(throttled)}.")
    return " ".join(words)


def _ratio_table(title: str, lines: Sequence[tuple[str, Sequence[Row]]], first: str) -> Table:
    """Return a table with a line for each label: microseconds of each contender, and ratios to the first."""
    names = list(dict.fromkeys(row.contender for _, rows in lines for row in rows))
    columns = [first, *(f"{name}, us" for name in names), *(f"{name} / {names[0]}" for name in names[1:])]
    cells = []
    for label, rows in lines:
        times = {row.contender: row.median_us for row in rows}
        base = times.get(names[0])
        ratios = [f"{times[name] / base:.2f}" if base and name in times else "" for name in names[1:]]
        cells.append([label, *(f"{times[name]:,.1f}" if name in times else "" for name in names), *ratios])
    return Table(title, columns, cells, Origin.MEASURED, _belief([row for _, rows in lines for row in rows]))


def layer_table(group: Group) -> Table:
    """Return the times of the parts of a network, a line for each part."""
    parts = list(dict.fromkeys(row.part for row in group.rows))
    lines = [(part or "the whole call", [row for row in group.rows if row.part == part]) for part in parts]
    return _ratio_table(group.title, lines, "part")


def side_by_side(groups: Sequence[Group]) -> list[Table]:
    """Return a table for each network that several devices ran: the times of each, and ratios inside each device."""
    tables = []
    networks = [group for group in groups if group.suite == "model"]
    for (case, dtype, batch), members in _by(networks, lambda group: (group.case, group.dtype, group.batch)):
        if len(members) < 2:
            continue
        names = list(dict.fromkeys(row.contender for group in members for row in group.wholes))
        columns = ["contender"]
        for group in members:
            columns += [group.device, f"time / {group.base.contender}"]
        cells = []
        for name in names:
            line = [name]
            for group in members:
                us = next((row.median_us for row in group.wholes if row.contender == name), None)
                line += ["", ""] if us is None else [time_text(us), f"{us / group.base.median_us:.2f}"]
            cells.append(line)
        tables.append(Table(f"{case}, {dtype}, batch {batch}", columns, cells, Origin.MEASURED))
    return tables


def small_tables(groups: Sequence[Group]) -> Iterator[Table]:
    """Return a table for each precision and batch of cases that are many and small."""
    for (dtype, batch), members in _by(groups, lambda group: (group.dtype, group.batch)):
        lines = [(group.case, group.rows) for group in members]
        yield _ratio_table(f"{dtype}, batch {batch}", lines, "case")


def paper_tables(groups: Sequence[Group]) -> Iterator[Table]:
    """Return the ratios of table 4 of the paper beside the paper's own."""
    found = paper_cases.ratios([row for group in groups for row in group.rows])
    if found:
        cells = [
            [
                f"{ratio.pair.rival} / {ratio.pair.small}", ratio.rival, ratio.small, f"{ratio.here:.1f}",
                f"{ratio.pair.paper_ratio:.1f} ({ratio.pair.paper_rival})",
            ]
            for ratio in found
        ]  # fmt: skip
        columns = ["times", "the first by", "the second by", "ratio here", "ratio in the paper"]
        yield Table("Ratios beside the paper's", columns, cells, Origin.MEASURED)


def published_tables(groups: Sequence[Group]) -> Iterator[Table]:
    """Return KernelBench's published times beside those of a GPU; nothing for rows of a CPU."""
    cells = []
    for group in groups:
        times = kernelbench.published(group.case)
        if group.suite == "kernelbench" and group.dtype == "float32" and times and not group.base.on_cpu:
            own = f"{group.base.median_us / 1e3:.2f}"
            cells.append([group.case, own, *(f"{ms:.2f}" for ms in times)])
    if cells:
        columns = ["case", f"{groups[0].base.contender} here, ms"]
        columns += [f"{way} on {kernelbench.HARDWARE}, published, ms" for way in ("eager", "compiled")]
        note = "The published times are of models in training mode, those here of models in eval mode."
        yield Table("Beside the published times", columns, cells, Origin.MEASURED, note)


# ----------------------------------------------------------------------------------------------------- pictures


def _by(groups: Sequence[Group], key: Callable[[Group], object]) -> Iterator[tuple[tuple[object, ...], list[Group]]]:
    found: dict[object, list[Group]] = {}
    for group in groups:
        found.setdefault(key(group), []).append(group)
    for value, members in found.items():
        yield value if isinstance(value, tuple) else (value,), members


def _picture(name: Sequence[object], title: str, svg: str) -> Picture:
    return Picture(environment.file_stem("-".join(map(str, name))), title, svg, Origin.MEASURED)


def by_batch(groups: Sequence[Group]) -> Iterator[Picture]:
    """Return throughput and latency over the batch; bars of the latency of a network with one batch."""
    for (device, case, dtype), members in _by(groups, lambda group: (group.device, group.case, group.dtype)):
        rows = [row for group in members for row in group.wholes]
        names = list(dict.fromkeys(row.contender for row in rows))
        subtitle = f"{case}, {dtype}, {device}"
        if len({row.batch for row in rows}) < 2:
            batch = rows[0].batch
            bars = [("", {row.contender: row.median_us / 1e3 for row in rows})]
            title = f"Time of a call, batch {batch}"
            svg = charts.bars(title, subtitle, bars, "ms")
            yield _picture((device, members[0].suite, case, dtype, "time"), title, svg)
            continue
        values: dict[str, tuple[str, bool, Callable[[Row], Any]]] = {
            "Throughput by batch": ("images/s", False, lambda row: row.images_per_s),
            "Time of a call by batch": ("ms", True, lambda row: row.median_us / 1e3),
        }
        for title, (unit, log, value) in values.items():
            series = {name: [(row.batch, value(row)) for row in rows if row.contender == name] for name in names}
            svg = charts.lines(title, subtitle, "images a call", unit, series, log=log)
            yield _picture((device, members[0].suite, case, dtype, title.split(" ")[0]), title, svg)


def _stage(part: str) -> str:
    """Return the stage of a block, 'blocks.2' of 'blocks.2.1'; other parts as they are."""
    head, _, last = part.rpartition(".")
    return head if head and last.isdigit() else part


def by_layer(groups: Sequence[Group]) -> Iterator[Picture]:
    """Return where the time of a network goes: stages on top of each other, and every block."""
    for group in groups:
        names = list(dict.fromkeys(row.contender for row in group.rows))
        parts = list(dict.fromkeys(row.part for row in group.rows if row.part))
        times = {(row.contender, row.part): row.median_us / 1e3 for row in group.rows}
        stacks: dict[str, dict[str, float]] = {}
        for name in names:
            stack = stacks.setdefault(name, {})
            for part in parts:
                stack[_stage(part)] = stack.get(_stage(part), 0.0) + times.get((name, part), 0.0)
        title, key = "Time by stage of the network", (group.device, "layer", group.case, group.dtype, group.batch)
        subtitle = f"{group.title}, {group.device}; medians of each part"
        yield _picture((*key, "stages"), title, charts.stacked(title, subtitle, stacks, "ms"))
        title = "Time by block"
        bars = [(part, {name: times[name, part] for name in names if (name, part) in times}) for part in parts]
        yield _picture((*key, "blocks"), title, charts.bars(title, subtitle, bars, "ms"))


def _ceiling(rows: Sequence[Row]) -> Ceiling | None:
    """Return the highest rates that the calibrations of rows found; None: there are none."""
    rates = [row.calibration for row in rows if row.calibration]
    if not rates:
        return None
    product, copy = (max(max(rate[name]) for rate in rates) for name in ("product_gflops", "copy_gb_s"))
    return Ceiling(product, copy, "matrix product, measured", "copy, measured")


def rooflines(groups: Sequence[Group]) -> Iterator[Picture]:
    """Return the operators below the roof of the same run.

    Not of float32 on a GPU, where the calibration is a product in bfloat16.
    """
    for (device, dtype, batch), members in _by(groups, lambda group: (group.device, group.dtype, group.batch)):
        rows = [row for group in members for row in group.rows if row.flops and row.bytes]
        ceiling = _ceiling(rows)
        if ceiling is None or (dtype == "float32" and not rows[0].on_cpu):
            continue
        points = [
            Point(
                row.contender, row.case.split(" ")[0], row.flops / row.bytes, row.flops / row.median_us / 1e3, row.case
            )
            for row in rows
            if row.flops and row.bytes
        ]
        title = "Operators below the roof of this machine"
        subtitle = f"{dtype}, batch {batch}, {device}; the roof is of the same run"
        svg = charts.roofline(title, subtitle, points, ceiling)
        yield _picture((device, "op", dtype, batch, "roofline"), title, svg)


def shares_of_floor(groups: Sequence[Group]) -> Iterator[Picture]:
    """Return which share of a block's time the least possible time is."""
    for (device, model, dtype, batch), members in _by(
        groups, lambda group: (group.device, group.case.split(" ")[0], group.dtype, group.batch)
    ):
        bars = []
        for group in members:
            shares = {row.contender: 100 * row.floor_us / row.median_us for row in group.rows if row.floor_us}
            if shares:
                _, path, shapes = group.case.split(" ", 2)
                bars.append((f"{path}, {shapes.split('x', 1)[1]}", shares))
        if not bars:
            continue
        title = "Share of the floor by block"
        subtitle = f"{model}, {dtype}, batch {batch}, {device}; floor: least bytes and FLOPs at the rates of the run"
        svg = charts.bars(title, subtitle, bars, "%", top=100)
        yield _picture((device, "block", model, dtype, batch, "floor"), title, svg)


def training_memory(groups: Sequence[Group]) -> Iterator[Picture]:
    """Return the peak memory of training steps."""
    for (device, case, dtype), members in _by(groups, lambda group: (group.device, group.case, group.dtype)):
        bars = []
        for group in members:
            peaks = {row.contender: row.peak_bytes / 1e6 for row in group.rows if row.peak_bytes is not None}
            if peaks:
                bars.append((f"batch {group.batch}", peaks))
        if bars:
            title = "Peak memory of a training step"
            svg = charts.bars(title, f"{case}, {dtype}, {device}", bars, "MB")
            yield _picture((device, "train", case, dtype, "memory"), title, svg)


def ratios(groups: Sequence[Group], title: str) -> Picture:
    """Return the times of cases relative to this package."""
    bars = [
        (group.title, {row.contender: row.median_us / group.base.median_us for row in group.wholes}) for group in groups
    ]
    svg = charts.bars(title, f"time / {groups[0].base.contender}, {groups[0].device}", bars, "x")
    return _picture((groups[0].device, groups[0].suite), title, svg)


def pictures(groups: Sequence[Group]) -> list[Picture]:
    """Return all pictures of the groups of one suite."""
    suite = groups[0].suite
    makers = {
        "model": (by_batch,), "latency": (by_batch,), "layer": (by_layer,), "op": (rooflines,),
        "block": (shares_of_floor,), "train": (by_batch, training_memory),
    }  # fmt: skip
    return [picture for maker in makers.get(suite, ()) for picture in maker(groups)]


def all_pictures(rows: Sequence[Row]) -> list[Picture]:
    """Return all pictures of rows, by device and suite."""
    groups = newest_groups(rows)
    found = []
    for device, suite in dict.fromkeys((group.device, group.suite) for group in groups):
        found += pictures([group for group in groups if (group.device, group.suite) == (device, suite)])
    return found


def tables(groups: Sequence[Group]) -> list[Table]:
    """Return all tables of the groups of one suite."""
    suite = groups[0].suite
    if suite in _SMALL:
        return [*small_tables(groups), *published_tables(groups)]
    if suite == "paper":
        return [*map(case_table, groups), *paper_tables(groups)]
    return [layer_table(group) if suite == "layer" else case_table(group) for group in groups]


def page(rows: Sequence[Row]) -> Page:
    """Return the page of result rows.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("page: no rows; at least one is needed")
    groups = newest_groups(rows)
    devices = list(dict.fromkeys(group.device for group in groups))
    lead = [
        "All contenders of a case ran in turns in one process, with the same weights and inputs; a wrong result was "
        "not timed. Times of different cases are not comparable, ratios inside a case are.",
        *(f"{device}: {origin_of([row for row in rows if row.device == device])}" for device in devices),
    ]
    found = Page("Benchmarks of effkernels", Origin.MEASURED, lead)
    together = side_by_side(groups)
    if together:
        found.add("Machines side by side", together)
    for device in devices:
        of_device = [group for group in groups if group.device == device]
        for suite in dict.fromkeys(group.suite for group in of_device):
            members = [group for group in of_device if group.suite == suite]
            heading = SUITE_TITLES.get(suite, suite)
            found.add(heading if len(devices) == 1 else f"{heading}, {device}", [*pictures(members), *tables(members)])
    return found

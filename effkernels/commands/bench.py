"""``effkernels bench``: networks, their blocks and their operators against each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from effkernels import console
from effkernels.bench import kernelbench, paper_cases, timing
from effkernels.bench.calibration import LARGEST_DRIFT
from effkernels.bench.contenders import CONTENDERS
from effkernels.bench.measure import Options, Refusal
from effkernels.bench.network_case import NetworkCase
from effkernels.bench.networks import Interrupted
from effkernels.bench.precision import PRECISIONS
from effkernels.bench.suites import DEFAULT_CONTENDERS, FOREIGN_CONTENDERS, SUITES, Settings, SuiteCase
from effkernels.bench.timing import Row
from effkernels.commands.common import (
    DEFAULT_MODEL,
    MODEL_HELP,
    UsageError,
    add_device,
    add_json,
    device_of,
    model_source,
    positive,
    reading,
    writing,
)
from effkernels.files import check_regular
from effkernels.report.measured import SUITE_TITLES

TEXT = "Time networks, their blocks or their operators against each other, in turns in one process."
WARMUP, ROUNDS = 3, 20
QUICK_WARMUP, QUICK_ROUNDS = 1, 5
# Exit status of a program that Ctrl-C ended.
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help=MODEL_HELP)
    parser.add_argument(
        "--suite", nargs="+", choices=SUITES, default=["model"], metavar="NAME",
        help="op: the operator calls of the models; block: their blocks; layer: their time block by block; model: the "
        "networks; latency: the networks with one image a call, each waited for; train: their training steps; "
        "kernelbench: KernelBench's problems, paper: table 4 of the EfficientNet paper on one core, and overhead: one "
        "call with next to no work, all three whatever --model and --batch-size are; default: model",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], metavar="N", help="default: 1")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: each model's own")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["float32"], metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}; default: float32",
    )  # fmt: skip
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="channels_last input for contenders that name no layout (effkernels, timm, torchvision)",
    )
    parser.add_argument(
        "--contender", nargs="+", metavar="NAME",
        help=f"or 'all'; default: {' '.join(DEFAULT_CONTENDERS)}; of other libraries' models: "
        f"{' '.join(FOREIGN_CONTENDERS)}; of op and block: effkernels eager compile; of train: all that it has",
    )  # fmt: skip
    parser.add_argument(
        "--list-contenders", action="store_true", help="list contenders and whether they can run, and stop"
    )
    parser.add_argument("--list", action="store_true", help="list the cases that would be measured, and stop")
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="TEXT",
        help="only cases whose line in --list contains one of these, or matches it as a shell pattern",
    )  # fmt: skip
    parser.add_argument("--results-file", metavar="FILE", help="append the rows to this file, one JSON object per line")
    parser.add_argument(
        "--resume", metavar="FILE", help="the same, and do not measure again what the file has from this code"
    )
    add_device(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's own number)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a first look: --rounds {QUICK_ROUNDS} --warmup {QUICK_WARMUP} --no-memory",
    )
    parser.add_argument("--warmup", type=positive, metavar="N", help=f"calls of each first; default: {WARMUP}")
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"turns of each; default: {ROUNDS}")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (a process per contender)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Time networks, blocks or operators against each other."""
    device = device_of(arguments.device)
    for model in arguments.model:
        model_source(model)
    if arguments.list_contenders:
        _print_contenders(str(device), arguments.model[0])
        return 0
    settings = _settings(arguments, device)
    cases = _cases(settings, arguments.suite, arguments.filter)
    if arguments.list:
        _print_cases(cases, arguments.json)
        return 0
    if arguments.resume and arguments.results_file not in (None, arguments.resume):
        raise UsageError(f"--resume {arguments.resume} and --results-file {arguments.results_file}; allowed: one file")
    results = _results_file(arguments.resume or arguments.results_file)
    known = _rows_of(results) if arguments.resume and results is not None else []
    done = {number: rows for number, case in enumerate(cases) if (rows := case.rows_in(known))}
    if done:
        console.note(f"bench: {len(done)} of {len(cases)} cases are in {results} already")
    date = timing.run_date()
    measured: list[tuple[SuiteCase, list[Row]]] = []
    refusals: list[Refusal] = []
    problem, interrupted = "", False
    todo = sum(case.steps for number, case in enumerate(cases) if number not in done)
    with console.progress("bench", todo) as advance:
        for number, case in enumerate(cases):
            if number in done:
                measured.append((case, done[number]))
                continue
            try:
                new_rows, new_refusals = case.measure(case.options, date=date, advance=advance, report=_report)
            except Interrupted as interrupt:
                new_rows, new_refusals, interrupted = interrupt.rows, interrupt.refusals, True
            except KeyboardInterrupt:
                interrupted = True
                break
            if results is not None:
                try:
                    # After each case, so that a run that is broken off keeps what it measured.
                    timing.append_rows(results, new_rows)
                except OSError as error:  # what is measured is printed all the same
                    problem = error.strerror or str(error)
            measured.append((case, new_rows))
            refusals += new_refusals
            if interrupted:
                break
    if arguments.json:
        report = {
            "rows": [asdict(row) for _, rows in measured for row in rows],
            "refusals": [asdict(refusal) for refusal in refusals],
            "interrupted": interrupted,
        }
        print(json.dumps(report, indent=2))
    else:
        _print_tables(measured)
    for refusal in refusals:
        console.note(f"bench: {refusal.case}: {refusal.contender}: {refusal.reason}")
    if not interrupted and set(arguments.suite) & {"model", "latency"}:
        _note_not_installed(measured[0][0].contenders if measured else (), device)
    if results is not None:
        told = f"--results-file {results}: {problem}" if problem else f"rows appended to {results}"
        console.note(f"bench: {told}")
    if interrupted:
        how = "" if results is None else f"; --resume {results} goes on"
        console.note(f"bench: interrupted, {len(measured)} of {len(cases)} cases have rows{how}")
        return INTERRUPTED
    asked = set(arguments.contender or ())
    incomplete = any(refusal.contender in asked for refusal in refusals)
    return 1 if incomplete or problem or not any(rows for _, rows in measured) else 0


def _settings(arguments: argparse.Namespace, device: torch.device) -> Settings:
    quick = arguments.quick
    options = Options(
        arguments.warmup or (QUICK_WARMUP if quick else WARMUP),
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        memory=not (arguments.no_memory or quick),
    )
    return Settings(
        models=tuple(dict.fromkeys(arguments.model)),
        batches=tuple(dict.fromkeys(arguments.batch_size)),
        precisions=tuple(dict.fromkeys(arguments.precision)),
        device=device,
        threads=arguments.threads or torch.get_num_threads(),
        options=options,
        img_size=arguments.img_size,
        channels_last=arguments.channels_last,
        contenders=tuple(arguments.contender or ()),
    )


def _cases(settings: Settings, suites: Sequence[str], patterns: Sequence[str]) -> list[SuiteCase]:
    try:
        cases = [case for suite in dict.fromkeys(suites) for case in SUITES[suite](settings)]
    except ValueError as error:
        message = str(error)
        raise UsageError(message if message.startswith("--") else f"--model: {message}") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"--model: {error}") from error
    kept = [case for case in cases if case.matches(patterns)]
    if not kept:
        raise UsageError(f"--filter {' '.join(patterns)}: none of {len(cases)} cases; --list shows them")
    return kept


def _report(line: str) -> None:
    console.note(f"bench: {line}")


def _note_not_installed(compared: Sequence[str], device: torch.device) -> None:
    """Name the other contenders for the device whose packages are not installed, and the command that installs them."""
    absent = {
        name: contender.not_installed()
        for name, contender in CONTENDERS.items()
        if name not in compared
        and device.type in contender.devices
        and not contender.lossy
        and contender.not_installed()
    }
    if absent:
        packages = dict.fromkeys(package for names in absent.values() for package in names)
        console.note(f"bench: not compared, because not installed: {', '.join(absent)}")
        console.note(f"bench: install them: {sys.executable} -m pip install {' '.join(packages)}")
        console.note(f"bench: then compare: --contender {' '.join([*compared, *absent])}")


def _results_file(name: str | None) -> Path | None:
    """Return the file of ``--results-file``, found fit to be appended to before anything is measured."""
    if name is None:
        return None
    path = Path(name)
    with writing("--results-file", name):
        if path.exists():
            check_regular(path)
        timing.append_rows(path, [])
    return path


def _rows_of(file: Path) -> list[Row]:
    with reading("--resume", file):
        try:
            return timing.read_rows(file)
        except ValueError as error:
            raise UsageError(f"--resume {error}") from error


def _print_tables(measured: Sequence[tuple[SuiteCase, list[Row]]]) -> None:
    """Print a table for each network and its layers, and one for all operators or blocks of a precision and a batch."""
    for case, rows in measured:
        if rows and case.suite in ("model", "latency", "paper"):
            of_suite = "" if case.suite == "model" else f"{case.suite}: "
            title = f"{of_suite}{case.case}, batch {case.batch}, {case.dtype}, {rows[0].device}"
            console.table(title, *_result_table(rows))
        if rows and case.suite == "paper":
            for ratio in paper_cases.ratios(rows):
                console.say(ratio.line)
        if rows and case.suite == "layer":
            by_part: dict[str | None, list[Row]] = {}
            for row in rows:
                by_part.setdefault(row.part, []).append(row)
            title = f"layers of {case.case}, batch {case.batch}, {case.dtype}, {rows[0].device}: microseconds"
            console.table(title, *_parts_table(list(by_part.values())))
    parts: dict[tuple[str, str, int], list[list[Row]]] = {}
    for case, rows in measured:
        if rows and case.suite not in ("model", "latency", "layer", "paper"):
            parts.setdefault((case.suite, case.dtype, case.batch), []).append(rows)
    for (suite, dtype, batch), groups in parts.items():
        title = f"{SUITE_TITLES[suite]}, batch {batch}, {dtype}, {groups[0][0].device}: microseconds"
        console.table(title, *_parts_table(groups))
    drifted = [row for _, rows in measured for row in rows if row.steady is False]
    if drifted:
        print(
            f"* The machine's own speed changed by more than {LARGEST_DRIFT:.0%} during this case, twice: believe the "
            "ratios of such a table, which was measured in turns, more than its times."
        )
    throttled = dict.fromkeys(
        reason for _, rows in measured for row in rows for reason in (row.machine or {}).get("throttled", ())
    )
    if throttled:
        print(f"The GPU's clock was held back: {', '.join(throttled)}.")


def _spread(rows: Sequence[Row]) -> str:
    """Return the largest spread of some rows for a table, with a star if the machine drifted."""
    spreads = [row.spread for row in rows if row.spread is not None]
    star = "*" if any(row.steady is False for row in rows) else ""
    return f"{max(spreads):.1%}{star}" if spreads else "-"


def _result_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells; the last column is the time relative to the first row's."""
    first = rows[0]
    columns = [
        "contender", "median ms", "p95 ms", "p99 ms", "images/s", "peak MB", "rel. error", "spread",
        f"x {first.contender}",
    ]  # fmt: skip
    cells = [
        [
            row.contender,
            f"{row.median_us / 1e3:.2f}",
            f"{row.p95_us / 1e3:.2f}",
            f"{row.p99_us / 1e3:.2f}",
            f"{row.images_per_s:.1f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
            f"{row.rel_error:.1e}",
            _spread([row]),
            f"{row.median_us / first.median_us:.2f}",
        ]
        for row in rows
    ]
    if any(row.host_us is not None for row in rows):
        columns.insert(-1, "host us")
        for row, line in zip(rows, cells, strict=True):
            line.insert(-1, "-" if row.host_us is None else f"{row.host_us:.0f}")
    return columns, cells


def _parts_table(groups: Sequence[Sequence[Row]]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells, a line per case; after each time its ratio to the first contender's."""
    names = list(dict.fromkeys(str(row.name) for rows in groups for row in rows))
    columns = ["case"]
    for name in names:
        columns += [name] if name == names[0] else [name, f"x {names[0]}"]
    # Times of another machine are beside those of a GPU alone, and of the precision that they were published in.
    of_others = [
        kernelbench.published(rows[0].case) if rows[0].dtype == "float32" and not rows[0].on_cpu else None
        for rows in groups
    ]
    if any(of_others):
        columns += [f"{kernelbench.HARDWARE} eager (published, training mode)", "compile (same)"]
    cells: list[list[str]] = []
    for rows in groups:
        times = {row.name: row.median_us for row in rows}
        line = [rows[0].part or rows[0].case]
        for name in names:
            time, base = times.get(name), times.get(names[0])
            line.append("-" if time is None else f"{time:.1f}")
            if name != names[0]:
                line.append("-" if time is None or base is None else f"{time / base:.2f}")
        if any(of_others):
            times_of_others = of_others[len(cells)]
            line += ["-", "-"] if times_of_others is None else [f"{1e3 * time:.0f}" for time in times_of_others]
        cells.append([*line, _spread(rows)])
    return [*columns, "spread"], cells


def _print_cases(cases: Sequence[SuiteCase], as_json: bool) -> None:
    if as_json:
        names = ("suite", "case", "dtype", "batch", "device", "contenders")
        print(json.dumps([{name: getattr(case, name) for name in names} for case in cases], indent=2))
        return
    for case in cases:
        console.say(f"{case.title}: {', '.join(case.contenders)}")


def _print_contenders(device: str, model: str) -> None:
    case = NetworkCase(model, 224, 1, device=device)
    cells = [
        [contender.name, contender.description, contender.unavailable(case) or "yes"]
        for contender in CONTENDERS.values()
    ]
    console.table(f"contenders for {model} on {device}", ["name", "what", "available"], cells)

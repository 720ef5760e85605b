"""``effkernels bench``: networks against each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from effkernels import console
from effkernels.bench import timing
from effkernels.bench.contenders import CONTENDERS, NetworkCase
from effkernels.bench.networks import Options, case_name, model_size, run_case, steps
from effkernels.bench.precision import PRECISIONS
from effkernels.bench.timing import Row
from effkernels.commands.common import (
    DEFAULT_MODEL,
    UsageError,
    add_device,
    add_json,
    device_of,
    positive,
    writing,
)
from effkernels.files import check_regular

TEXT = "Time networks against each other, in turns in one process."
DEFAULT_CONTENDERS = ("effkernels", "eager", "eager-channels-last", "compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], metavar="N", help="default: 1")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: each model's own")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="channels_last input for contenders that name no layout (effkernels, timm, torchvision)",
    )
    parser.add_argument(
        "--contender", nargs="+", metavar="NAME", help=f"or 'all'; default: {' '.join(DEFAULT_CONTENDERS)}"
    )
    parser.add_argument(
        "--list-contenders", action="store_true", help="list contenders and whether they can run, and stop"
    )
    parser.add_argument("--results-file", metavar="FILE", help="append the rows to this file, one JSON object per line")
    add_device(parser)
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's own number)")
    parser.add_argument(
        "--warmup", type=positive, default=3, metavar="N", help="calls of each first; default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=20, metavar="N", help="turns of each; default: %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (a process per contender)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Time networks against each other."""

    device = device_of(arguments.device)
    if arguments.list_contenders:
        _print_contenders(str(device), arguments.model[0])
        return 0
    results = _results_file(arguments.results_file)
    contenders = _known_contenders(arguments.contender, device)
    threads = arguments.threads or torch.get_num_threads()
    options = Options(arguments.warmup, arguments.rounds, memory=not arguments.no_memory)
    cases = [
        NetworkCase(
            model,
            arguments.img_size or model_size(model),
            batch,
            arguments.precision,
            str(device),
            threads,
            arguments.channels_last,
        )
        for model in arguments.model
        for batch in arguments.batch_size
    ]
    date = timing.run_date()
    rows, refusals, problem = [], [], ""
    with console.progress("bench", len(cases) * steps(contenders, options)) as advance:
        for case in cases:
            new_rows, new_refusals = run_case(case, contenders, options, date=date, advance=advance, report=_report)
            if results is not None:
                try:
                    # After each case, so that a run that is broken off keeps what it measured.
                    timing.append_rows(results, new_rows)
                except OSError as error:  # what is measured is printed all the same
                    problem = error.strerror or str(error)
            rows.append((case, new_rows))
            refusals += new_refusals
    if arguments.json:
        report = {
            "rows": [asdict(row) for _, measured in rows for row in measured],
            "refusals": [asdict(refusal) for refusal in refusals],
        }
        print(json.dumps(report, indent=2))
    else:
        for case, measured in rows:
            if measured:
                title = f"{case_name(case)}, batch {case.batch}, {case.numbers.name}, {measured[0].device}"
                console.table(title, *_result_table(measured))
    for refusal in refusals:
        console.note(f"bench: {refusal.case}: {refusal.contender}: {refusal.reason}")
    _note_not_installed(contenders, device)
    if results is not None:
        told = f"--results-file {results}: {problem}" if problem else f"rows appended to {results}"
        console.note(f"bench: {told}")
    asked = set(arguments.contender or ())
    incomplete = any(refusal.contender in asked for refusal in refusals)
    return 1 if incomplete or problem or not any(measured for _, measured in rows) else 0


def _report(line: str) -> None:
    console.note(f"bench: {line}")


def _note_not_installed(compared: Sequence[str], device: torch.device) -> None:
    """Name the other contenders for the device whose packages are not installed, and the command that installs them."""
    absent = {
        name: contender.not_installed()
        for name, contender in CONTENDERS.items()
        if name not in compared and device.type in contender.devices and contender.not_installed()
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


def _result_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells; the last column is the time relative to the first row's."""
    first = rows[0]
    columns = [
        "contender", "median ms", "p95 ms", "p99 ms", "images/s", "peak MB", "rel. error", f"x {first.contender}",
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
            f"{row.median_us / first.median_us:.2f}",
        ]
        for row in rows
    ]
    return columns, cells


def _print_contenders(device: str, model: str) -> None:

    case = NetworkCase(model, 224, 1, device=device)
    cells = [
        [contender.name, contender.description, contender.unavailable(case) or "yes"]
        for contender in CONTENDERS.values()
    ]
    console.table(f"contenders for {model} on {device}", ["name", "what", "available"], cells)


def _known_contenders(names: Sequence[str] | None, device: torch.device) -> list[str]:
    if names is None:
        return list(DEFAULT_CONTENDERS)
    if "all" in names:
        return [name for name, contender in CONTENDERS.items() if device.type in contender.devices]
    for name in names:
        if name not in CONTENDERS:
            raise UsageError(f"--contender {name}: not known; allowed: all, {', '.join(CONTENDERS)}")
    return list(dict.fromkeys(names))

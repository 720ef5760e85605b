"""``effkernels tune``: measures on this GPU what the pure functions can only estimate, and writes it to a file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from effkernels import console, triton
from effkernels.bench.autotune import Job, Outcome, Result, Tuner, jobs
from effkernels.bench.op_calls import calls_of
from effkernels.bench.precision import PRECISIONS, Precision
from effkernels.commands.common import (
    DEFAULT_MODEL,
    MODEL_HELP,
    UsageError,
    add_json,
    building,
    device_of,
    model_source,
    positive,
    why_no_gpu,
)
from effkernels.ops import backends
from effkernels.triton import tuned_plan

TEXT = "Measure which Triton tiles, and which backend, are fastest for the calls of some models on this GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("--model", nargs="+", default=[DEFAULT_MODEL], metavar="NAME", help=MODEL_HELP)
    parser.add_argument("--batch-size", type=positive, nargs="+", default=[1], metavar="N", help="default: 1")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: each model's own")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["bfloat16"], metavar="NAME",
        help=f"of {', '.join(PRECISIONS)}; default: bfloat16",
    )  # fmt: skip
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="tune only these operators; default: all")
    parser.add_argument("--device", metavar="NAME", help="cuda or cuda:N (default: the first GPU)")
    parser.add_argument("--force", action="store_true", help="measure again what is already tuned")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured, and stop")
    parser.add_argument("--clear", action="store_true", help="delete what was tuned on this GPU, and stop")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Tune the calls of some models."""
    for model in arguments.model:
        model_source(model)
    for op in arguments.ops:
        if op not in backends.OPERATORS:
            raise UsageError(f"--ops {op}: not an operator; allowed: {', '.join(backends.OPERATORS)}")
    device = _device(arguments.device)
    name = tuned_plan.device_name(device)
    assert name is not None, "a device that Triton runs on has a name"
    if arguments.clear:
        return _clear(name, arguments.json)
    if not arguments.dry_run:
        _check_folder()
    plan = tuned_plan.read(name)
    tuner = Tuner(device, plan, force=arguments.force)
    todo = _jobs(arguments, device)
    if arguments.dry_run:
        _print_todo(name, tuner, todo, arguments.json)
        return 0
    if device.type == "cpu":
        console.note("tune: Triton interprets its kernels here, and the times of the interpreter mean nothing")
    results, failed, known = _tune(tuner, todo)
    file = tuned_plan.file_of(name)
    if arguments.json:
        report = {
            "device": name, "file": str(file), "results": [asdict(result) for result in results], "known": known,
            "failed": failed,
        }  # fmt: skip
        print(json.dumps(report, indent=2))
    else:
        console.table(f"tuned on {name}", *_table(results))
    console.note(f"tune: {len(results)} new results, {known} known before; {file}")
    return 1 if failed else 0


def _device(name: str | None) -> torch.device:
    if name is None and not torch.cuda.is_available() and triton.INTERPRETED and triton.INSTALLED:
        return torch.device("cpu")
    if name is None and not torch.cuda.is_available():
        raise UsageError(f"no GPU: {why_no_gpu()}")
    device = device_of(name)
    problem = triton.problem_of("pointwise_bn_act", device)
    if problem:
        raise UsageError(f"--device {device}: there is nothing to tune: {problem}")
    if device.type == "cuda" and name in (None, "cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_folder() -> None:
    """Refuse a folder that cannot be written to, before minutes are spent on results that could not be kept."""
    folder = tuned_plan.folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be created: {error.strerror}; {tuned_plan.VARIABLE} names another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written to; {tuned_plan.VARIABLE} names another folder")


def _clear(device: str, as_json: bool) -> int:
    files = [str(file) for file in tuned_plan.clear(device)]
    if as_json:
        print(json.dumps({"device": device, "removed": files}, indent=2))
    else:
        print("\n".join(f"removed {file}" for file in files) or f"nothing was tuned on {device}")
    return 0


def _jobs(arguments: argparse.Namespace, device: torch.device) -> list[Job]:
    with building():
        calls = [call for model in arguments.model for call in calls_of(model, arguments.img_size)]
    dtypes = [Precision.of(name, device.type).computes_in for name in arguments.precision]
    return jobs(calls, list(dict.fromkeys(arguments.batch_size)), list(dict.fromkeys(dtypes)), arguments.ops)


def _tune(tuner: Tuner, todo: Sequence[Job]) -> tuple[list[Result], list[str], int]:
    """Return all results, what failed, and how many answers were already known. Each answer is written at once."""
    results: list[Result] = []
    failed: list[str] = []
    known = 0
    with console.progress("tune", len(todo)) as advance:
        for job in todo:
            outcome: Outcome = tuner.run(job)
            if outcome.results:
                # After each call, so that an interrupted run keeps what it measured.
                try:
                    tuned_plan.record(tuner.plan)
                except OSError as error:  # more answers could not be kept either
                    failed.append(f"{tuned_plan.file_of(tuner.plan.device)}: {error.strerror or error}")
                    console.note(f"tune: {failed[-1]}")
                    return results + outcome.results, failed, known
            results += outcome.results
            failed += outcome.failed
            known += outcome.known
            for line in (*outcome.failed, *outcome.refused):
                console.note(f"tune: {line}")
            advance(str(job))
    return results, failed, known


def _table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    columns = ["call", "before", "us", "after", "us", "gain", "noise"]
    cells = [
        [
            result.call,
            result.before,
            f"{result.before_us:.1f}",
            "the same" if result.after == result.before else result.after,
            f"{result.after_us:.1f}",
            f"{result.before_us / result.after_us:.2f}x",
            f"{result.noise:.1%}",
        ]
        for result in results
    ]
    return columns, cells


def _print_todo(device: str, tuner: Tuner, todo: Sequence[Job], as_json: bool) -> None:
    rows: list[dict[str, Any]] = []
    for job in todo:
        lookups = [lookup for lookup in tuner.lookups(job) if len(lookup.candidates) > 1]
        reason = tuner.why_no_comparison(job)
        rows.append(
            {
                "call": str(job),
                "candidates": sum(len(lookup.candidates) for lookup in lookups),
                "known": sum(tuner.is_known(lookup) for lookup in lookups),
                "open": sum(not tuner.is_known(lookup) for lookup in lookups),
                "backends": reason or " and ".join(tuner.rivals),
            }
        )
    if as_json:
        print(json.dumps({"device": device, "file": str(tuned_plan.file_of(device)), "calls": rows}, indent=2))
        return
    columns = ["call", "candidates", "known", "open", "backends to compare"]
    console.table(f"to tune on {device}", columns, [[str(value) for value in row.values()] for row in rows])

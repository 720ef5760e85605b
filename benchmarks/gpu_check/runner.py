"""Chooses the parts of the GPU check, runs each in a process of its own, and prints the summary."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.common import FAILED, NO_GPU, NOT_AVAILABLE, PASSED, ROOT, WORK, environment, parser, python

ALONE_SECONDS = 480.0  # of a part that runs alone


@dataclass(frozen=True)
class Part:
    """One part: a module of this folder, what it shows, and its share of the twenty minutes in seconds."""

    name: str
    says: str
    seconds: float


PARTS: tuple[Part, ...] = (
    Part("build", "the library is there and runs on this GPU; else it is built", 150),
    Part("parity", "every parity test on the device, by CUDA and by Triton kernels", 210),
    Part("wrappers", "PTX wrappers, streams, CUDA graphs, device limits: tests/gpu", 90),
    Part("sanitizer", "compute-sanitizer: memcheck, racecheck, synccheck", 120),
    Part("launches", "launches of each operator, by the profiler", 40),
    Part("ops", "operators by CUDA and Triton against PyTorch, torch.compile and cuDNN", 230),
    Part("models", "EfficientNet-B0 against every contender", 290),
    Part("profile", "Nsight Compute on the main kernels", 60),
)


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: str
    result: str
    seconds: float
    note: str


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts asked for, in their fixed order; all of them for no name.

    Raises:
        ValueError: a name is not a part's.
    """
    unknown = [name for name in names if name not in {part.name for part in PARTS}]
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; allowed: {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or part.name in names]


def run_one(part: Part, arguments: Sequence[str], seconds: float, log: Path) -> Outcome:
    """Run one part, show and log what it prints, and stop it where it runs past its time."""
    command = python("-m", f"benchmarks.gpu_check.{part.name}", "--seconds", str(seconds), *arguments)
    print(f"\n== {part.name}: {part.says}", flush=True)
    begin = time.monotonic()
    stopped = threading.Event()
    last = ""
    with log.open("a", encoding="utf-8") as copy:
        copy.write(f"\n== {part.name}\n")
        # A process group of its own, so that what a part has started ends with it.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), cwd=ROOT,
            preexec_fn=os.setpgrp,
        )  # fmt: skip

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        # A part keeps to its time by itself; this is for one that hangs.
        alarm = threading.Timer(seconds * 1.25 + 20, stop)
        alarm.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                copy.write(line)
                copy.flush()
                last = line.strip() or last
            status = process.wait()
        except KeyboardInterrupt:
            stop()
            raise
        finally:
            alarm.cancel()
    if stopped.is_set():
        return Outcome(part.name, "failed", time.monotonic() - begin, f"stopped after {time.monotonic() - begin:.0f} s")
    result = {PASSED: "passed", NOT_AVAILABLE: "not available"}.get(status, "failed")
    note = last.removeprefix("not available: ").removeprefix("failed: ")
    return Outcome(part.name, result, time.monotonic() - begin, note)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table that comes last."""
    rows = [("part", "result", "seconds", "note")]
    rows += [(o.part, o.result, f"{o.seconds:.0f}", o.note[:100]) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{part:<{widths[0]}}  {result:<{widths[1]}}  {seconds:>{widths[2]}}  {note}".rstrip()
        for part, result, seconds, note in rows
    ]
    counted = [f"{sum(o.result == kind for o in outcomes)} {kind}" for kind in ("passed", "failed", "not available")]
    return "\n".join([*lines, ", ".join(counted)])


def why_not_here(device: str) -> str | None:
    """Why the check cannot run on this machine, in one line, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name another Python: make gpu-check PYTHON=/path/to/python3"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} finds none here; run it on a machine with one"
    return None


def copy_out(files: Sequence[Path]) -> None:
    """Copy what a reader wants to the folder named by the environment variable OUT, if there is one."""
    out = os.environ.get("OUT")
    if not out:
        return
    for file in files:
        if file.is_file() and file.parent != Path(out):
            shutil.copy(file, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    made = parser("Check and measure on a GPU; 'not available' is not 'passed'.")
    made.prog = "python3 -m benchmarks.gpu_check"
    made.add_argument("parts", nargs="*", help=f"of {', '.join(part.name for part in PARTS)}; default: all")
    made.set_defaults(seconds=None)
    parsed = made.parse_args(arguments)
    try:
        parts = chosen(parsed.parts)
    except ValueError as error:
        made.error(str(error))
    reason = why_not_here(parsed.device)
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return NO_GPU

    WORK.mkdir(parents=True, exist_ok=True)
    out = Path(os.environ.get("OUT") or WORK)
    log, table = out / "gpu-check.log", out / "summary.txt"
    passed_on = ["--device", parsed.device, "--results", str(parsed.results), "--dtypes", *parsed.dtypes]
    passed_on += ["--smoke"] * parsed.smoke + ["--max-autotune"] * parsed.max_autotune
    outcomes = []
    for part in parts:
        seconds = parsed.seconds or (ALONE_SECONDS if len(parts) == 1 else part.seconds)
        outcomes.append(run_one(part, passed_on, seconds, log))
        table.write_text(summary(outcomes) + "\n", encoding="utf-8")
        results = WORK / "results" if parsed.smoke else parsed.results
        copy_out([*results.glob("*.jsonl"), WORK / "ncu.txt"] if part.name in ("ops", "models", "profile") else [])
    print(f"\n{summary(outcomes)}", flush=True)
    return FAILED if any(outcome.result == "failed" for outcome in outcomes) else PASSED

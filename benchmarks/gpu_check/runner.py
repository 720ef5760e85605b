"""Runs the parts of the GPU check, each in a process of its own and within its time, and prints the summary."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import common, schedule
from benchmarks.gpu_check.common import FAILED, NO_GPU, NOT_AVAILABLE, PASSED, ROOT, WORK, environment, parser, python
from benchmarks.gpu_check.progress import Progress, copy_out, run_key
from benchmarks.gpu_check.schedule import PARTS, Part, chosen

KINDS = ("passed", "failed", "not available", "cut", "not reached")
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Outcome:
    """The end of a part: one of `KINDS`, or "running"."""

    part: str
    result: str
    seconds: float
    note: str


def run_one(
    part: Part, arguments: Sequence[str], seconds: float, log: Path, progress: Progress, dry: bool = False
) -> Outcome:
    """Run one part, show and log what it prints, and stop it where it does not keep to its time.

    Args:
        seconds: the limit given to the part. It ends soon after, see `schedule.allowance`.
        dry: without a GPU, at sizes for which one thread is quicker than several.
    """
    print(f"\n== {part.name}, {seconds:.0f} s: {part.says}", flush=True)
    begin = time.monotonic()
    told = ("--seconds", f"{seconds:.1f}", "--started", f"{begin:.1f}")
    command = python("-m", f"benchmarks.gpu_check.{part.name}", *told, *arguments)
    # A session of its own: what a part has started ends with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
        env={**environment(), **({"OMP_NUM_THREADS": "1"} if dry else {})},
    )  # fmt: skip
    last = [""]

    def show() -> None:
        assert process.stdout is not None
        with log.open("a", encoding="utf-8") as copy:
            copy.write(f"\n== {part.name}\n")
            for line in process.stdout:
                print(line, end="", flush=True)
                copy.write(line)
                copy.flush()
                last[0] = line.strip() or last[0]

    # Not this thread: a process that the part did not end can hold its output open for longer than the part has time.
    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    late = False
    try:
        try:
            status = process.wait(seconds + schedule.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            late, status = True, _end(process)
    finally:
        _end(process)
        reader.join(1.0)
    took = time.monotonic() - begin
    if late:
        return Outcome(part.name, "cut", took, progress.of(part.name).how_far())
    if status < 0:
        return Outcome(part.name, "failed", took, f"died by signal {-status} at {progress.of(part.name).how_far()}")
    names = {PASSED: "passed", NOT_AVAILABLE: "not available", common.CUT: "cut"}
    result = names.get(status, "failed")
    return Outcome(part.name, result, took, last[0].removeprefix(f"{result}: "))


def _end(process: subprocess.Popen[str]) -> int:
    """Ask a part to end, then kill what is left of it and of what it has started."""
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(schedule.KILL_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    return process.wait()


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError):  # all of it has ended
        os.killpg(group, number)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the table that comes last."""
    rows = [("part", "result", "seconds", "note")]
    rows += [(o.part, o.result, f"{o.seconds:.0f}" if o.seconds else "", o.note[:140]) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{part:<{widths[0]}}  {result:<{widths[1]}}  {seconds:>{widths[2]}}  {note}".rstrip()
        for part, result, seconds, note in rows
    ]
    counts = {kind: sum(o.result == kind for o in outcomes) for kind in KINDS}
    counted = [f"{count} {kind}" for kind, count in counts.items() if count or kind in KINDS[:3]]
    return "\n".join([*lines, ", ".join(counted)])


def why_not_here(device: str) -> str | None:
    """Return why the check cannot run on this machine, in one line, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; name another Python: make gpu-check PYTHON=/path/to/python3"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} finds none here; run it on a machine with one"
    return None


class Check:
    """One call of the check.

    Args:
        parts: to run, unless an earlier call has finished them.
        total: seconds that it may take, from `begin` on (of time.monotonic).
        arguments: passed on to every part.
        out: folder of the log and the summary.
        dry: without a GPU.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        total: float,
        arguments: Sequence[str],
        progress: Progress,
        out: Path,
        begin: float,
        dry: bool = False,
    ) -> None:
        self.parts = parts
        self.dry = dry
        self.total = total
        self.arguments = [*arguments, "--progress", str(progress.file)]
        assert progress.file is not None
        self.progress, self.progress_file = progress, progress.file
        self.log, self.table = out / "gpu-check.log", out / "summary.txt"
        self.begin = begin
        self.outcomes = {part.name: self._earlier(part.name) for part in parts}

    def _earlier(self, name: str) -> Outcome:
        """Return how a part ended in an earlier call."""
        known = self.progress.of(name)
        if not known.result:
            return Outcome(name, "not reached", 0.0, "")
        return Outcome(name, known.result, known.seconds, f"earlier: {known.note}")

    def run(self) -> None:
        """Give every part its turn, then those that have something left a second one."""
        known = {part.name: self.progress.of(part.name) for part in self.parts}
        finished = [name for name, state in known.items() if state.finished]
        failed = [name for name, state in known.items() if state.result == "failed"]
        todo = schedule.order(self.parts, finished, failed)
        if not todo:
            print("gpu-check: nothing is left to do")
        for part in todo:
            self._turn(part, schedule.cap(part, todo, self.total))
        for part in todo:
            state = self.progress.of(part.name)
            if state.left or state.result in ("", "cut"):
                self._turn(part, self.total)

    def _turn(self, part: Part, most: float) -> None:
        left = self.begin + self.total - time.monotonic()
        seconds = schedule.allowance(part, most, left)
        if seconds is None:
            return
        earlier = self.outcomes[part.name]
        self._write(Outcome(part.name, "running", 0.0, "the check ended before this part did"))
        try:
            outcome = run_one(part, self.arguments, seconds, self.log, self.progress, self.dry)
        except BaseException:
            self._write(Outcome(part.name, "cut", earlier.seconds, self.progress.of(part.name).how_far()))
            raise
        self._write(Outcome(part.name, outcome.result, earlier.seconds + outcome.seconds, outcome.note))
        self.progress.note(
            part.name, result=outcome.result, seconds=earlier.seconds + outcome.seconds, note=outcome.note
        )

    def _write(self, outcome: Outcome) -> None:
        self.outcomes[outcome.part] = outcome
        copy_out(self.progress_file)
        self.table.write_text(summary(list(self.outcomes.values())) + "\n", encoding="utf-8")


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does inside what ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    begin = time.monotonic()
    made = parser("Check and measure on a GPU; 'not available' is not 'passed'.")
    made.prog = "python3 -m benchmarks.gpu_check"
    made.add_argument("parts", nargs="*", help=f"of {', '.join(part.name for part in PARTS)}; default: all")
    made.add_argument("--minutes", type=float, default=schedule.MINUTES, help="of this call (default: %(default)s)")
    made.add_argument(
        "--progress", type=Path, metavar="FILE", help="what earlier calls have done (default: in build/gpu-check)"
    )
    made.add_argument("--afresh", action="store_true", help="forget what earlier calls have done")
    parsed = made.parse_args(arguments)
    try:
        parts = chosen(parsed.parts)
    except ValueError as error:
        made.error(str(error))
    if not parsed.minutes > 0:
        made.error(f"--minutes {parsed.minutes}: must be more than 0")
    reason = why_not_here(parsed.device)
    if reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return NO_GPU

    WORK.mkdir(parents=True, exist_ok=True)
    progress = Progress((parsed.progress or WORK / "progress.jsonl").absolute())
    if parsed.afresh:
        progress.forget()
    arguments = common.passed_on(parsed)
    sizes = [f"smoke {parsed.smoke}", f"max-autotune {parsed.max_autotune}", *parsed.dtypes]
    goes_on = progress.begin(run_key(ROOT, [_device_name(parsed.device), *sizes]))
    dry = parsed.smoke and parsed.device == "cpu"
    check = Check(parts, 60 * parsed.minutes, arguments, progress, Path(os.environ.get("OUT") or WORK), begin, dry)
    if goes_on:
        print("gpu-check: goes on where the last call of the same source ended; --afresh begins again", flush=True)
    try:
        with interrupted_by_sigterm():
            check.run()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        copy_out(check.log, check.table, WORK / "ncu.txt")
        print(f"\n{summary(list(check.outcomes.values()))}", flush=True)
        if dry:
            print("a dry run: it shows that the code of the check runs, and nothing about a GPU", flush=True)
    return FAILED if any(outcome.result == "failed" for outcome in check.outcomes.values()) else PASSED


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"

"""Shared by the parts of the GPU check: how a part ends, its options, its steps and its time, foreign tools."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks.gpu_check.progress import Progress
from benchmarks.kernel_economy.reading import ToolMissing, find_tool

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-check"  # what a part leaves for a reader
RESULTS = ROOT / "benchmarks" / "results"

# How a part ends, as its exit status.
PASSED, FAILED, NO_GPU, CUT, NOT_AVAILABLE = 0, 1, 2, 75, 77

_SHOWN_STEPS = 12  # of those that are left

Step = TypeVar("Step")


class NotAvailable(Exception):
    """Something that a part needs does not work on this machine; the message says what, in one line."""


class Cut(Exception):
    """The time is up and there is more to do; the message says how far the part came."""


class Work:
    """The steps of a part: what an earlier call has done is left out, and so is what does not fit the time.

    Attributes:
        progress: where steps are written down as they begin and end.
    """

    def __init__(self, part: str, seconds: float, progress: Progress, started: float | None = None) -> None:
        self.part = part
        self.seconds = seconds
        self.progress = progress
        self._started = time.monotonic() if started is None else started
        self._wrong: dict[str, str] = {}
        self._state = progress.of(part)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._started + self.seconds - time.monotonic()

    def steps(self, steps: Mapping[str, Step], seconds: Callable[[Step], float]) -> Iterator[tuple[str, Step]]:
        """Return each step that is to do now, with its name. A step is done when the next one is asked for.

        Args:
            steps: by their names, in the order of what is most worth knowing.
            seconds: what a step takes by all that is known. One that does not fit is left for another call.
        """
        state = self._state
        state.planned, state.under_way = list(steps), ""
        self.progress.note(self.part, planned=state.planned)
        if state.done:
            print(f"goes on after {state.how_far()}", flush=True)
        for name in state.left:
            # Less than it had when it was cut would be lost again.
            if self.left <= max(seconds(steps[name]), state.cut_after.get(name, 0.0)):
                continue
            self.progress.note(self.part, begun=name, left=round(self.left, 1))
            yield name, steps[name]
            _still_answers()
            state.done[name] = self._wrong.get(name, "")
            self.progress.note(self.part, done=name, wrong=state.done[name])

    def wrong(self, step: str, what: str) -> None:
        """Note that a step under way found something wrong, in one line. The part continues and fails at its end."""
        if step not in self._wrong:
            self._wrong[step] = what

    def end(self, note: str) -> str:
        """Return the note of a part that came to its end.

        Raises:
            AssertionError: a step found something wrong, in this call or in an earlier one.
            Cut: there are steps left.
        """
        wrong = self._state.wrong
        assert not wrong, f"{len(wrong)} of {len(self._state.done)} steps wrong, the first: {wrong[0]}"
        left = self._state.left
        if left:
            more = [f"and {len(left) - _SHOWN_STEPS} more"] if len(left) > _SHOWN_STEPS else []
            print(f"for lack of time ({self.seconds:.0f} s) left out:", *left[:_SHOWN_STEPS], *more, sep="\n  ")
            raise Cut(f"{self._state.how_far()}; {note}")
        return note


def _still_answers() -> None:
    """Raise where a kernel has failed in a way that no later call of this process survives.

    Without it every step after an illegal access would count as wrong. With it the process ends, the step counts as
    begun, and the next process continues with it or, after its last try, with the one after it.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Options:
    """A part's arguments.

    Attributes:
        device: "cuda", or "cpu" to try what runs without a GPU.
        seconds: the part's time.
        smoke: tiny sizes, and stand-ins for tools that need a GPU: the code is tried, the numbers mean nothing and are
            not recorded among the results.
        results: the folder of the result files.
        dtypes, max_autotune: of the operator benchmark.
        progress: what earlier calls did, see `progress`.
        started: when the part's time began, of time.monotonic: before its process was there, whose imports take some.
    """

    device: str = "cuda"
    seconds: float = 240.0
    smoke: bool = False
    results: Path = RESULTS
    dtypes: tuple[str, ...] = ("bfloat16",)
    max_autotune: bool = False
    progress: Progress = field(default_factory=lambda: Progress(None))
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    def work(self, part: str) -> Work:
        """Return the steps of a part."""
        return Work(part, self.seconds, self.progress, self.started)

    @property
    def dry(self) -> bool:
        """Return whether tools that need a GPU have stand-ins."""
        return self.smoke and self.device == "cpu"

    def needs_gpu(self) -> None:
        """Raise NotAvailable without a GPU or a stand-in for it."""
        if self.device != "cuda" and not self.dry:
            raise NotAvailable("needs a GPU")

    def tool(self, name: str) -> Path:
        """Return a tool of the CUDA toolkit, or its stand-in.

        Raises:
            NotAvailable: there is none.
        """
        self.needs_gpu()
        if self.dry:
            from benchmarks.gpu_check.stand_ins import stand_in

            return stand_in(name, WORK)
        try:
            return find_tool(name)
        except ToolMissing as missing:
            raise NotAvailable(str(missing)) from missing


def parser(description: str) -> argparse.ArgumentParser:
    """Return the arguments that every part takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: cuda")
    made.add_argument("--smoke", action="store_true", help="tiny sizes, to try the code")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for result rows")
    made.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"], metavar="DTYPE",
        help="of the operator benchmark (default: bfloat16)",
    )  # fmt: skip
    made.add_argument("--max-autotune", action="store_true", help="time torch.compile's max-autotune of operators too")
    return made


def passed_on(parsed: argparse.Namespace) -> list[str]:
    """Return the arguments of `parser` as a command line."""
    words = ["--device", parsed.device, "--results", str(parsed.results), "--dtypes", *parsed.dtypes]
    return words + ["--smoke"] * parsed.smoke + ["--max-autotune"] * parsed.max_autotune


def run_part(part: Callable[[Options], str], arguments: Sequence[str] | None = None) -> int:
    """Run a part as a program: its return value is the note for the summary, the last line that it prints.

    An AssertionError is a check that failed. Whatever else is raised is shown with its traceback, and fails as well.
    """
    made = parser((part.__doc__ or "").split("\n")[0])
    made.add_argument("--seconds", type=float, default=240.0, help="time of this part (default: %(default)s)")
    made.add_argument("--progress", type=Path, help="file from which a later call goes on (default: none)")
    made.add_argument(
        "--started", type=float, default=time.monotonic(), help="when its time began, of time.monotonic (default: now)"
    )
    parsed = made.parse_args(arguments)
    options = Options(
        parsed.device, parsed.seconds, parsed.smoke, parsed.results, tuple(parsed.dtypes), parsed.max_autotune,
        Progress(parsed.progress), parsed.started,
    )  # fmt: skip
    try:
        print(part(options), flush=True)
    except NotAvailable as reason:
        print(f"not available: {reason}", flush=True)
        return NOT_AVAILABLE
    except Cut as far:
        print(f"cut: {far}", flush=True)
        return CUT
    except AssertionError as failure:
        print(f"failed: {failure}", flush=True)
        return FAILED
    return PASSED


def environment() -> dict[str, str]:
    """Return the environment for a process of this repository: its packages come from the work tree."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def python(*arguments: str) -> list[str]:
    """Return the command that runs this Python."""
    return [sys.executable, *arguments]


def tool_output(
    command: Sequence[str | Path], seconds: float, variables: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and output of a foreign tool, errors and output together.

    Args:
        variables: added to the environment.

    Raises:
        NotAvailable: it cannot be started, or does not end in time.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=max(1.0, seconds), env={**environment(), **(variables or {})}, cwd=ROOT,
        )  # fmt: skip
    except OSError as error:
        raise NotAvailable(f"{command[0]} does not start: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise NotAvailable(f"{Path(command[0]).name} did not end within {seconds:.0f} s") from error
    return done.returncode, done.stdout

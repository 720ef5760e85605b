"""What the parts of the GPU check share: how a part ends, its options, its time box, running foreign tools."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-check"  # what a part leaves for a reader
RESULTS = ROOT / "benchmarks" / "results"

# How a part ends, as its exit status.
PASSED, FAILED, NO_GPU, NOT_AVAILABLE = 0, 1, 2, 77


class NotAvailable(Exception):
    """Something that a part needs does not work on this machine; the message says what, in one line."""


@dataclass
class TimeBox:
    """A part's time. What does not fit is left out, and named at the end."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.started + self.seconds - time.monotonic()

    def affords(self, what: str, seconds: float) -> bool:
        """Whether there is time for something that takes about so long; if not, it is noted as left out."""
        if self.left >= seconds:
            return True
        self.left_out.append(what)
        return False

    def report(self) -> None:
        """Say what was left out."""
        if self.left_out:
            print(f"left out for lack of time ({self.seconds:.0f} s): {len(self.left_out)}")
            for what in self.left_out:
                print(f"  {what}")


@dataclass(frozen=True)
class Options:
    """A part's arguments.

    Attributes:
        device: "cuda", or "cpu" to try what runs without a GPU.
        seconds: the part's time.
        smoke: tiny sizes: the code is tried, the numbers mean nothing and are not recorded among the results.
        results: the folder of the result files.
        extra: dtypes and contenders beyond the usual ones.
    """

    device: str = "cuda"
    seconds: float = 240.0
    smoke: bool = False
    results: Path = RESULTS
    dtypes: tuple[str, ...] = ("bfloat16",)
    max_autotune: bool = False

    @property
    def time_box(self) -> TimeBox:
        """A time box that starts now."""
        return TimeBox(self.seconds)


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that every part takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: cuda")
    made.add_argument("--seconds", type=float, default=240.0, help="time of a part (default: %(default)s)")
    made.add_argument("--smoke", action="store_true", help="tiny sizes, to try the code")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder for result rows")
    made.add_argument(
        "--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"], metavar="DTYPE",
        help="of the operator benchmark (default: bfloat16)",
    )  # fmt: skip
    made.add_argument("--max-autotune", action="store_true", help="time torch.compile's max-autotune of operators too")
    return made


def run_part(part: Callable[[Options], str], arguments: Sequence[str] | None = None) -> int:
    """Run a part as a program: its return value is the note for the summary, the last line that it prints.

    An AssertionError is a check that failed. Whatever else is raised is shown with its traceback, and fails as well.
    """
    parsed = parser((part.__doc__ or "").split("\n")[0]).parse_args(arguments)
    options = Options(
        parsed.device, parsed.seconds, parsed.smoke, parsed.results, tuple(parsed.dtypes), parsed.max_autotune
    )
    try:
        print(part(options), flush=True)
    except NotAvailable as reason:
        print(f"not available: {reason}", flush=True)
        return NOT_AVAILABLE
    except AssertionError as failure:
        print(f"failed: {failure}", flush=True)
        return FAILED
    return PASSED


def environment() -> dict[str, str]:
    """The environment for a process of this repository: its packages come from the work tree."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def python(*arguments: str) -> list[str]:
    """The command that runs this Python."""
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

"""Builds the driver and lets a tool count: callgrind, or perf where the machine has counters."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CMAKE_TREE = ROOT / "build" / "cmake"
TARGET = "count_instructions"
ROUNDS = 100  # of a case under perf, which counts whole processes


class CannotCount(Exception):
    """Neither tool works here; the message says why."""


def build_driver() -> Path:
    """Build the driver from the objects of the library and return its path."""
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None or not (CMAKE_TREE / "CMakeCache.txt").exists():
        raise CannotCount("there is no build/cmake, or no cmake; run: make build")
    done = subprocess.run(
        [cmake, "--build", str(CMAKE_TREE), "--target", TARGET], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CannotCount(f"the driver was not built: {(done.stdout + done.stderr)[-2000:]}")
    return CMAKE_TREE / TARGET


def total_of(dump: str) -> int:
    """Return the instructions in the text of a callgrind dump."""
    found = re.search(r"^(?:totals|summary): (\d+)", dump, re.MULTILINE)
    if found is None:
        raise ValueError("the dump of callgrind has neither a line 'totals:' nor 'summary:'")
    return int(found[1])


def instructions_of(report: str) -> int:
    """Return the instructions in what `perf stat -x,` printed."""
    for line in report.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[2].startswith("instructions") and fields[0].isdigit():
            return int(fields[0])
    raise ValueError(f"perf counted no instructions: {report.strip()[:200]}")


def by_callgrind(driver: Path, isa: str) -> dict[str, int]:
    """Return the instructions of each case, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        done = subprocess.run(
            [
                *("valgrind", "--tool=callgrind", "--toggle-collect=counted_call", "--dump-after=counted_call"),
                *(f"--callgrind-out-file={out}", str(driver), isa),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise CannotCount(f"valgrind failed: {done.stderr[-500:]}")
        names = done.stdout.splitlines()
        return {name: total_of(Path(f"{out}.{number}").read_text()) for number, name in enumerate(names, start=1)}


def by_perf(driver: Path, isa: str) -> dict[str, int]:
    """Return the instructions of each case, by its name: of one of many rounds, so that the process counts little."""
    names = subprocess.run([str(driver), isa], capture_output=True, text=True, check=True).stdout.splitlines()

    def whole(case: int, rounds: int) -> int:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", str(driver), isa, str(case), str(rounds)]
        return instructions_of(subprocess.run(command, capture_output=True, text=True, check=True).stderr)

    return {name: (whole(case, 1 + ROUNDS) - whole(case, 1)) // ROUNDS for case, name in enumerate(names)}


def pick_counter() -> Callable[[Path, str], dict[str, int]]:
    """Return the counter that works on this machine.

    Raises:
        CannotCount: none does.
    """
    if shutil.which("valgrind"):
        return by_callgrind
    if shutil.which("perf"):
        try:
            instructions_of(
                subprocess.run(
                    ["perf", "stat", "-x,", "-e", "instructions:u", "true"], capture_output=True, text=True, check=True
                ).stderr
            )
        except (subprocess.CalledProcessError, ValueError) as error:
            raise CannotCount(f"valgrind is not installed, and perf does not count: {error}") from error
        return by_perf
    raise CannotCount("neither valgrind nor perf is installed")

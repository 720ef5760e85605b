"""Fuzzes files: every checkpoint and image loads and equals what it holds, or is refused by the one error of its kind.

    python -m benchmarks.fuzz.inputs --count 2000 --seed 7     # draws cases; a line for each failure
    python -m benchmarks.fuzz.inputs --case 7000012            # repeats one

The cases run in a process of their own, so that a crash, a hang or gigabytes of memory are failures like others.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

_SEEDS = 1_000_000  # cases of one seed
_LONGEST = 60.0  # seconds of a case
_START = 300.0  # seconds until PyTorch is imported, on a busy machine
_MOST_MEMORY = 2**20  # kilobytes that a case may add to the largest ever used


@dataclass
class Tally:
    """The counts of tried cases.

    Attributes:
        attempts, failed: by class of case.
        failures: a line each.
    """

    attempts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, seed: int, name: str, problem: str | None) -> None:
        """Count a case."""
        kind = name.partition(":")[0]
        self.attempts[kind] += 1
        if problem is not None:
            self.failed[kind] += 1
            self.failures.append(
                f"inputs: {name} {problem}; repeat: python -m benchmarks.fuzz.inputs --case {seed}".replace("\n", " ")
            )


def run(seconds: float, seed: int) -> list[str]:
    """Fuzz for some seconds; a line for each failure."""
    return tally(range(seed * _SEEDS, (seed + 1) * _SEEDS), seconds).failures


def tally(seeds: Iterable[int], seconds: float = float("inf")) -> Tally:
    """Run the cases of these seeds, or as many of them as the seconds allow."""
    found = Tally()
    end = time.monotonic() + seconds
    remaining = iter(seeds)
    more = True
    while more:
        more = _with_worker(remaining, end, found)
    return found


def _with_worker(seeds: Iterator[int], end: float, found: Tally) -> bool:
    """Run cases until the seeds or the time are over (False) or the worker is lost (True)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_work, args=(there,), daemon=True)
    worker.start()
    there.close()
    try:
        if not here.poll(_START):
            raise RuntimeError("the worker does not start")
        here.recv()
        for seed in seeds:
            if time.monotonic() > end:
                return False
            here.send(seed)
            name = "lost"
            try:
                if not here.poll(_LONGEST):
                    found.add(seed, "lost:", f"takes more than {_LONGEST:g} s")
                    return True
                name, problem = here.recv()
            except EOFError:
                worker.join()
                found.add(seed, "lost:", f"ends the process with status {worker.exitcode}")
                return True
            found.add(seed, name, problem)
        return False
    finally:
        worker.kill()
        worker.join()


def _work(connection: Connection) -> None:
    """Run the cases whose seeds come in."""
    from benchmarks.fuzz import _checkpoints, _images  # noqa: F401  # before the memory is looked at

    connection.send("ready")
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                seed = connection.recv()
            except EOFError:
                return
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            name, problem = case(seed, Path(folder))
            added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if problem is None and added > _MOST_MEMORY:
                problem = f"takes {added // 1024} MiB"
            connection.send((name, problem))


def case(seed: int, folder: Path) -> tuple[str, str | None]:
    """Run one case: its name, and what is wrong with its outcome."""
    from benchmarks.fuzz import _checkpoints, _images

    draw = random.Random(seed)
    kind = draw.choices(("content", "damaged", "note", "values", "image", "name"), (8, 8, 3, 4, 3, 1))[0]
    if kind == "values":
        name, problem = _images.values_case(draw, folder)
    elif kind == "image":
        name, problem = _images.damaged_case(draw, folder)
    elif kind == "name":
        name, problem = _images.name_case(draw, folder)
    else:
        make = {
            "content": _checkpoints.content_case,
            "damaged": _checkpoints.damaged_case,
            "note": _checkpoints.note_case,
        }
        name, path, expected = make[kind](draw, folder)
        return f"checkpoint {name}", _checkpoints.check(path, expected)
    return f"image {name}", problem


def main() -> int:
    """Draw cases, or repeat one; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz.inputs", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="N", help="at most")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="cases at most; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--case", type=int, metavar="SEED", help="repeat the case of a failure")
    options = parser.parse_args()
    first = options.seed * _SEEDS
    seeds = range(first, first + options.count) if options.case is None else [options.case]
    found = tally(seeds, options.seconds)
    for line in found.failures:
        print(line)
    for kind, attempts in sorted(found.attempts.items()):
        print(f"{kind}: {attempts} cases, {found.failed[kind]} failures", file=sys.stderr)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())

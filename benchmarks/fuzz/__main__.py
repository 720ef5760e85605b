"""Runs fuzzers one after another: ``python -m benchmarks.fuzz [PART ...] --seconds N --seed S``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable

import benchmarks.fuzz

Run = Callable[[float, int], list[str]]


def parts() -> dict[str, Run]:
    """Return every module of the package that has `run`, by its name."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.fuzz.__path__):
        if not module.name.startswith("_"):
            run = getattr(importlib.import_module(f"benchmarks.fuzz.{module.name}"), "run", None)
            if run is not None:
                found[module.name] = run
    return found


def main() -> int:
    """Run what is asked for; the exit status is 1 where a case failed."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("part", nargs="*", metavar="PART", help=f"{', '.join(known)}; default: all of them")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="of each part; default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    options = parser.parse_args()
    for name in options.part:
        if name not in known:
            parser.error(f"PART {name}; allowed: {', '.join(known)}")
    count = 0
    for name in options.part or known:
        start = time.monotonic()
        failures = known[name](options.seconds, options.seed)
        for line in failures:
            print(line)
        print(f"{name}: {len(failures)} failures in {time.monotonic() - start:.0f} s", file=sys.stderr)
        count += len(failures)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())

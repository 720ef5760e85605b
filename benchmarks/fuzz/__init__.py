"""Fuzzers: many calls with hostile arguments, each held against the one right outcome; ``python -m benchmarks.fuzz``.

A part is a module here with ``run(seconds: float, seed: int) -> list[str]``. It draws cases until the seconds are over,
every case from a seed of its own that follows from `seed`, and returns one line for each failure. A line names the seed
that repeats the case.
"""

from __future__ import annotations

"""The measuring core: contenders timed in turns, statistics, result rows and the file they are appended to.

Nothing here knows what is measured. A contender is a function that makes one call on the i-th of several inputs; the
models' contenders are in ``contenders.py``, the operators' in the repository's ``benchmarks/``.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch

from effkernels import environment
from effkernels.files import append_text, parse_json, read_text

Run = Callable[[int], object]

# A sample shorter than this is the mean of several calls: reading the clock twice costs about 0.1 us.
_SHORTEST_SAMPLE_S = 20e-6
# One turn of a contender: long enough for caches and clock frequency to settle on it, short enough that a slow drift
# of the machine meets all contenders alike.
_TURN_S = 0.05
_MOST_SAMPLES_PER_TURN = 50
# Rotated inputs: at most this many, and at most this much memory.
_MOST_INPUTS = 64
_MOST_INPUT_BYTES = 512 << 20


@dataclass(frozen=True)
class Statistics:
    """Of the time of one call, in microseconds."""

    median_us: float
    p95_us: float
    p99_us: float
    samples: int


def summarise(samples_us: Sequence[float]) -> Statistics:
    """Median and percentiles of times in microseconds, interpolated linearly between neighbouring samples."""
    if not samples_us:
        raise ValueError("summarise: no samples; at least one is needed")
    times = torch.tensor(list(samples_us), dtype=torch.float64)
    if not bool(torch.isfinite(times).all()):
        raise ValueError("summarise: a sample is not finite; times are finite microseconds")
    middle, p95, p99 = (float(torch.quantile(times, q)) for q in (0.5, 0.95, 0.99))
    return Statistics(middle, p95, p99, len(samples_us))


def round_medians(samples: Sequence[float], rounds: int) -> list[float]:
    """Return the median of each round of a contender's times, which has as many of them in every round."""
    each = max(1, len(samples) // rounds)
    return [float(median(samples[start : start + each])) for start in range(0, each * rounds, each)]


def spread_of(medians: Sequence[float]) -> tuple[float, float, float]:
    """Return (low, median, high) of the medians of rounds: low and high leave out a tenth of them on either side.

    A single hiccup of the machine does not widen it, and what is left is what a repeated round would give.
    """
    values = torch.tensor(list(medians), dtype=torch.float64)
    low, middle, high = (float(torch.quantile(values, share)) for share in (0.1, 0.5, 0.9))
    return low, middle, high


def input_count(bytes_each: int, cache_bytes: int) -> int:
    """Return how many inputs to rotate so that none is still in the cache when it is used again.

    Twice the cache in total, at least 2, and bounded so that tiny inputs do not become thousands and large ones do not
    fill the memory.
    """
    wanted = math.ceil(2 * cache_bytes / max(bytes_each, 1))
    affordable = max(2, _MOST_INPUT_BYTES // max(bytes_each, 1))
    return max(2, min(wanted, affordable, _MOST_INPUTS))


def _time_calls(
    run: Run, indices: Iterable[int], samples: int, calls_per_sample: int, device: torch.device
) -> list[float]:
    """``samples`` times of one call, in microseconds.

    On a GPU by events, all recorded before the first is waited for: launches overlap execution as in real use.
    """
    index = iter(indices)
    if device.type == "cuda":
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(samples)]
        torch.cuda.synchronize(device)
        for start, end in events:
            start.record()
            for _ in range(calls_per_sample):
                run(next(index))
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) * 1e3 / calls_per_sample for start, end in events]
    times = []
    for _ in range(samples):
        begin = time.perf_counter_ns()
        for _ in range(calls_per_sample):
            run(next(index))
        times.append((time.perf_counter_ns() - begin) / 1e3 / calls_per_sample)
    return times


def time_in_turns(
    runs: Mapping[str, Run],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 3,
    rounds: int = 20,
    advance: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Time every contender of ``runs`` in turns, in this process.

    In each round every contender has one turn, in an order drawn anew (from a fixed seed), so that neither drift nor a
    neighbour's habits favours one of them. A turn starts with one call that is not counted and brings back its
    weights and threads, then takes samples for about a twentieth of a second, at least one.

    Args:
        runs: name -> function that makes one call on input number i (any non-negative i).
        warmup: calls of each contender before the first round.
        rounds: turns of each contender.
        advance: called with the contender's name after each of its turns.

    Returns:
        name -> times of one call in microseconds, in the order they were measured.
    """
    if not runs:
        raise ValueError("time_in_turns: no contenders; at least one is needed")
    if warmup < 1 or rounds < 1:
        raise ValueError(f"time_in_turns: warmup={warmup}, rounds={rounds}; both must be at least 1")
    device = torch.device(device)
    counters = {name: itertools.count() for name in runs}
    calls_per_sample: dict[str, int] = {}
    samples: dict[str, int] = {}
    for name, run in runs.items():
        _time_calls(run, counters[name], warmup, 1, device)
        call_s = min(_time_calls(run, counters[name], 2, 1, device)) / 1e6
        calls_per_sample[name] = max(1, math.ceil(_SHORTEST_SAMPLE_S / max(call_s, 1e-9)))
        turn = _TURN_S / max(call_s * calls_per_sample[name], 1e-9)
        samples[name] = max(1, min(_MOST_SAMPLES_PER_TURN, int(turn)))

    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs)
        random.Random(number).shuffle(order)
        for name in order:
            runs[name](next(counters[name]))
            times[name] += _time_calls(runs[name], counters[name], samples[name], calls_per_sample[name], device)
            advance(name)
    return times


@dataclass(frozen=True)
class Row:
    """One measurement: one contender on one case. None if nobody measured or computed the value.

    Every row of one run carries the same ``date``: a ratio counts only between such rows.

    Attributes of the last fields, which say how far the times can be believed:
        name: of the contender on the command line; ``contender`` also says which implementation ran.
        rounds: turns of each contender.
        round_low_us, round_high_us: the medians of the rounds, without the lowest and the highest tenth of them.
        spread: their distance over the median of the rounds.
        host_us: until a call returns to the host, on a GPU.
        calibration: rates of the machine before and after, see `calibration.Calibration`.
        drift: by which share the rate that changed more changed.
        steady: whether that is no more than `calibration.LARGEST_DRIFT`.
        attempts: how often the case was measured; a first attempt that drifted is thrown away.
        machine: [lowest, highest] of the load, the clocks and so on, see `machine.Watch`.
        part: of the network that the times are of, in the suite layer; None: of the whole case.
        flops: that the case must compute at least, two for each multiply-add.
    """

    suite: str
    case: str
    contender: str
    device: str
    dtype: str
    batch: int
    median_us: float
    p95_us: float
    p99_us: float
    images_per_s: float
    peak_bytes: int | None
    rel_error: float | None
    floor_us: float | None
    bytes: int | None
    launches: int | None
    commit: str | None
    dirty: bool | None
    date: str
    versions: dict[str, str | None]
    # Rows from before these fields lack them.
    name: str | None = None
    rounds: int | None = None
    round_low_us: float | None = None
    round_high_us: float | None = None
    spread: float | None = None
    host_us: float | None = None
    calibration: dict[str, list[float]] | None = None
    drift: float | None = None
    steady: bool | None = None
    attempts: int | None = None
    machine: dict[str, Any] | None = None
    part: str | None = None
    flops: int | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU was measured: its name says the number of threads."""
        return self.device.endswith((" thread", " threads"))

    def to_json(self) -> str:
        """Return the row as one line of strict JSON."""
        return json.dumps(asdict(self), allow_nan=False)


def run_date() -> str:
    """Return the stamp of a run: UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def make_row(
    statistics: Statistics,
    *,
    suite: str,
    case: str,
    contender: str,
    device: str,
    dtype: str,
    batch: int,
    date: str,
    packages: Sequence[str] = (),
    peak_bytes: int | None = None,
    rel_error: float | None = None,
    floor_us: float | None = None,
    bytes: int | None = None,
    flops: int | None = None,
    launches: int | None = None,
) -> Row:
    """Return a row with the commit and versions of this process filled in.

    Args:
        packages: distributions besides torch and triton whose versions decide this measurement.
        rel_error: relative L2 distance to the float64 reference.
        bytes, flops: what the case must move and compute at least; ``floor_us`` the time that takes on this device.
    """
    commit, dirty = environment.commit()
    return Row(
        suite=suite,
        case=case,
        contender=contender,
        device=device,
        dtype=dtype,
        batch=batch,
        median_us=round(statistics.median_us, 3),
        p95_us=round(statistics.p95_us, 3),
        p99_us=round(statistics.p99_us, 3),
        images_per_s=round(batch / statistics.median_us * 1e6, 3),
        peak_bytes=peak_bytes,
        rel_error=rel_error,
        floor_us=floor_us,
        bytes=bytes,
        launches=launches,
        commit=commit,
        dirty=dirty,
        date=date,
        versions=environment.versions(*packages),
        flops=flops,
    )


def append_rows(file: Path, rows: Iterable[Row]) -> None:
    """Append rows to a results file, one JSON object per line; the folder is made if need be.

    Raises:
        OSError: the file cannot be written to; it is then as it was.
    """
    append_text(file, "".join(row.to_json() + "\n" for row in rows))


def read_rows(file: Path) -> list[Row]:
    """Read a results file.

    Raises:
        ValueError: a line is not JSON or lacks a field; the message names file and line.
    """
    rows = []
    names = [field.name for field in fields(Row) if field.default is MISSING]
    later = [field.name for field in fields(Row) if field.default is not MISSING]
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            needed = {name: values[name] for name in names}
            rows.append(Row(**needed, **{name: values[name] for name in later if name in values}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: not a result row: {error!r}; needed fields: {', '.join(names)}"
            ) from error
    return rows

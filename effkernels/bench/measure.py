"""Time contenders in turns, and note how far the times can be believed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effkernels.bench import timing
from effkernels.bench.calibration import LARGEST_DRIFT, Calibration, calibrate
from effkernels.bench.machine import Watch
from effkernels.bench.timing import Run

# Calls of which the host's own time is taken, on a GPU.
_HOST_CALLS = 20
# Beyond this many times what plain PyTorch is off in the same precision it is no inaccuracy but another function, and
# the speed of a wrong answer is worth nothing.
WRONG = 10


@dataclass(frozen=True)
class Refusal:
    """A contender that was asked for and did not run, and why, in one line."""

    contender: str
    case: str
    reason: str


@dataclass(frozen=True)
class Options:
    """Options of a measurement.

    Attributes:
        warmup: calls of each contender before the first round.
        rounds: turns of each contender.
        memory: measure peak memory too.
        calibrate: measure the machine before and after.
        waited: wait for the end of each call, also on a GPU: the latency of a single request.
    """

    warmup: int = 3
    rounds: int = 20
    memory: bool = True
    calibrate: bool = True
    waited: bool = False


@dataclass(frozen=True)
class Measurement:
    """The times of some contenders on one case.

    Attributes:
        times: of one call in microseconds, in the order in which they were measured, by contender.
        rounds: turns of each contender, all of as many times.
        host_us: median time until a call returns to the host, on a GPU; a CPU's call returns when it is done.
        calibrations: of the machine, before and after the turns; None: not measured.
        attempts: how often the case was measured, of which the last counts: 2 after a drift of the first.
        machine: summary of `machine.Watch`.
    """

    times: Mapping[str, list[float]]
    rounds: int
    host_us: Mapping[str, float]
    calibrations: tuple[Calibration, Calibration] | None
    attempts: int
    machine: dict[str, Any] | None

    @property
    def drift(self) -> float | None:
        """Return by how much the machine's own speed changed during the turns; None: not measured."""
        return None if self.calibrations is None else self.calibrations[0].drift(self.calibrations[1])

    def floor_us(self, moved: int, flops: int) -> float | None:
        """Return the least time of a case at the rates of the calibrations, in microseconds; None: not measured.

        Args:
            moved: bytes that it must read and write at least.
            flops: two for each multiply-add.
        """
        if self.calibrations is None:
            return None
        product = max(one.product_gflops for one in self.calibrations)
        copy = max(one.copy_gb_s for one in self.calibrations)
        return round(max(flops / product, moved / copy) / 1e3, 3)

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields of a `timing.Row` that say how far a contender's times can be believed."""
        low, median, high = timing.spread_of(timing.round_medians(self.times[name], self.rounds))
        host, drift = self.host_us.get(name), self.drift
        rates = None
        if self.calibrations is not None:
            before, after = self.calibrations
            rates = {
                "product_gflops": [round(before.product_gflops, 2), round(after.product_gflops, 2)],
                "copy_gb_s": [round(before.copy_gb_s, 2), round(after.copy_gb_s, 2)],
            }
        return {
            "rounds": self.rounds,
            "round_low_us": round(low, 3),
            "round_high_us": round(high, 3),
            "spread": round((high - low) / median, 4),
            "host_us": None if host is None else round(host, 3),
            "calibration": rates,
            "drift": None if drift is None else round(drift, 4),
            "steady": None if drift is None else drift <= LARGEST_DRIFT,
            "attempts": self.attempts,
            "machine": self.machine,
        }


def measure(
    runs: Mapping[str, Run],
    device: torch.device,
    options: Options,
    *,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[str], None] = lambda name: None,
    report: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Time contenders in turns between two calibrations of the machine.

    If the machine's own speed drifted meanwhile by more than `LARGEST_DRIFT`, everything is measured again, once.

    Args:
        runs: as of `timing.time_in_turns`.
        dtype: that they compute in, and that the calibration takes.
        advance: called after each turn of the first attempt.
        report: called with a line if there is a second attempt.
    """
    measured = _attempt(runs, device, dtype, options, 1, advance)
    if measured.drift is not None and measured.drift > LARGEST_DRIFT:
        report(f"the machine's own speed drifted by {measured.drift:.1%}: measured again")
        measured = _attempt(runs, device, dtype, options, 2, lambda name: None)
    return measured


def _attempt(
    runs: Mapping[str, Run],
    device: torch.device,
    dtype: torch.dtype,
    options: Options,
    attempt: int,
    advance: Callable[[str], None],
) -> Measurement:
    watch = Watch(device)
    watch.sample()

    def turn_done(name: str) -> None:
        advance(name)
        if device.type == "cuda":
            watch.sample()

    before = calibrate(device, dtype) if options.calibrate else None
    if options.waited and device.type == "cuda":
        runs = {name: _waiting(run, device) for name, run in runs.items()}
    times = timing.time_in_turns(
        runs,
        device="cpu" if options.waited else device,  # whoever waits for the result reads a clock of the host
        warmup=options.warmup,
        rounds=options.rounds,
        advance=turn_done,
    )
    host_us = host_times(runs, device) if device.type == "cuda" and not options.waited else {}
    after = calibrate(device, dtype) if options.calibrate else None
    watch.sample()
    calibrations = None if before is None or after is None else (before, after)
    return Measurement(times, options.rounds, host_us, calibrations, attempt, watch.summary())


def _waiting(run: Run, device: torch.device) -> Run:
    def waited(number: int) -> None:
        run(number)
        torch.cuda.synchronize(device)

    return waited


def host_times(runs: Mapping[str, Run], device: torch.device) -> dict[str, float]:
    """Return the median time until a call returns to the host, in microseconds, the device idle when it begins."""
    found = {}
    for name, run in runs.items():
        times = []
        for number in range(_HOST_CALLS):
            torch.cuda.synchronize(device)
            begin = time.perf_counter_ns()
            run(number)
            times.append((time.perf_counter_ns() - begin) / 1e3)
        torch.cuda.synchronize(device)
        found[name] = timing.summarise(times).median_us
    return found

"""Two files of results, row by row: what became slower or faster, and whether the difference is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from effkernels.bench.timing import Row

# Two processes of the same code differ by some per cent, by where the system puts their memory, however quiet the
# rounds of each are.
LEAST_CHANGE = 0.02


class Verdict(Enum):
    """What a difference is."""

    SLOWER = "slower"
    FASTER = "faster"
    NOISE = "noise"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Difference:
    """One contender on one case in both files.

    Attributes:
        before, after: its newest rows.
        noise: by which share the longer time must exceed the shorter one to count; None: a row does not say how its
            rounds spread.
    """

    before: Row
    after: Row
    noise: float | None

    @property
    def change(self) -> float:
        """Return by which share the second time is longer; negative if it is shorter."""
        return self.after.median_us / self.before.median_us - 1

    @property
    def bound(self) -> float | None:
        """Return up to which ratio of the second time to the first the difference is noise, on its side of 1."""
        if self.noise is None:
            return None
        return 1 + self.noise if self.change >= 0 else 1 / (1 + self.noise)

    @property
    def verdict(self) -> Verdict:
        """Return what the difference is."""
        if self.bound is None:
            return Verdict.UNKNOWN
        if self.change >= 0:
            return Verdict.SLOWER if 1 + self.change > self.bound else Verdict.NOISE
        return Verdict.FASTER if 1 + self.change < self.bound else Verdict.NOISE


@dataclass(frozen=True)
class Comparison:
    """Two results files.

    Attributes:
        differences: of what both have, in the order of the first file.
        only_before, only_after: newest rows of what only one of them has.
        same_device: the rows are of the same device; else their calibrations are not compared.
    """

    differences: tuple[Difference, ...]
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    same_device: bool

    def having(self, verdict: Verdict) -> list[Difference]:
        """Return the differences with a verdict."""
        return [difference for difference in self.differences if difference.verdict == verdict]


Key = tuple[str, ...]


def _newest(rows: Sequence[Row], with_device: bool) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in rows:
        key: Key = (row.suite, row.case, row.part or "", row.dtype, str(row.batch), row.contender)
        key = (*key, row.device) if with_device else key
        if key not in found or row.date >= found[key].date:
            found[key] = row
    return found


def compare(before: Sequence[Row], after: Sequence[Row], *, least_change: float = LEAST_CHANGE) -> Comparison:
    """Match rows by suite, case, part, dtype, batch and contender; of each the newest counts.

    A file of one device may be compared with one of another device. With several devices in a file, the device must be
    the same too.

    Args:
        least_change: a smaller share never counts.
    """
    devices = {row.device for row in before}, {row.device for row in after}
    same = devices[0] == devices[1]
    with_device = same or any(len(names) > 1 for names in devices)
    old, new = _newest(before, with_device), _newest(after, with_device)
    same_device = same or with_device
    return Comparison(
        tuple(
            Difference(row, new[key], _noise(row, new[key], least_change, same_device))
            for key, row in old.items()
            if key in new
        ),
        tuple(row for key, row in old.items() if key not in new),
        tuple(row for key, row in new.items() if key not in old),
        same_device,
    )


def _noise(before: Row, after: Row, least_change: float, same_device: bool) -> float | None:
    """Return the change that rounds and machine could make by themselves.

    The rounds of the slower row, without their fastest tenth, must be slower than those of the other one without their
    slowest tenth, even after the machine is allowed what its own calibration lost between the two.
    """
    slow, fast = (after, before) if after.median_us >= before.median_us else (before, after)
    if slow.round_low_us is None or fast.round_high_us is None:
        return None
    rounds = (fast.round_high_us / fast.median_us) * (slow.median_us / slow.round_low_us)
    return max(least_change, rounds * (_machine_loss(fast, slow) if same_device else 1.0) - 1)


def _machine_loss(fast: Row, slow: Row) -> float:
    """Return by which factor the machine itself may have been slower in the second row, at the most; at least 1."""
    if fast.calibration is None or slow.calibration is None:
        return 1.0
    shared = fast.calibration.keys() & slow.calibration.keys()
    return max([1.0, *(max(fast.calibration[rate]) / min(slow.calibration[rate]) for rate in shared)])

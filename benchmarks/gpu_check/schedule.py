"""Plan the parts of the GPU check, their order, and the time of each: pure functions of the available time.

The order is that of what is most worth knowing after a few minutes on a GPU. A part that needs less than its share
leaves the rest to those after it; when all have had their turn, those that were cut continue in the remaining time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

MINUTES = 9.0  # of one call: some ten minutes with the start of the machine

# Between the end of a part's time and the moment when it is gone, whatever it was doing.
GRACE_SECONDS = 4.0  # then it is asked to end,
KILL_SECONDS = 3.0  # and then it is killed.
# What the check itself needs after its last part: the summary, copies of files.
_CLOSING_SECONDS = 2.0


@dataclass(frozen=True)
class Part:
    """One part: a module of this folder.

    Attributes:
        says: what it shows.
        share: of the time of the whole check; it is cut where it needs more. They may add up to more than 1, because
            the first parts seldom need theirs.
        least: seconds below which it is not worth its start.
    """

    name: str
    says: str
    share: float
    least: float


PARTS: tuple[Part, ...] = (
    Part("build", "the library is there and runs on this GPU; else it is built", 0.22, 5),
    Part("wrappers", "PTX wrappers, streams, CUDA graphs, the engine, device limits: tests/gpu", 0.12, 15),
    Part("launches", "launches of each operator, by the profiler", 0.06, 10),
    Part("models", "EfficientNet-B0 and B4 against eager PyTorch and torch.compile", 0.38, 30),
    Part(
        "ops", "operators and whole blocks against PyTorch and cuDNN, and their share of the copy bandwidth", 0.25, 20
    ),
    Part("train_steps", "depthwise steps of training, backward and forward, against PyTorch and cuDNN", 0.10, 15),
    Part(
        "training", "training steps of B0 and B4: gradients, time, peak memory; fine-tuning with frozen norms", 0.15, 20
    ),
    Part("parity", "every parity test on the device by the CUDA kernels", 0.20, 25),
    Part("profile", "Nsight Compute on the main kernels", 0.10, 15),
    Part("sanitizer", "compute-sanitizer: memcheck, racecheck, synccheck", 0.15, 20),
    Part("triton", "every parity test on the device by the Triton kernels", 0.25, 25),
    Part("tune", "how Triton kernels are best cut on this GPU", 0.20, 20),
)


def chosen(names: Sequence[str]) -> list[Part]:
    """Return the parts asked for, in their fixed order; all of them for no name.

    Raises:
        ValueError: a name is not a part's.
    """
    unknown = [name for name in names if name not in {part.name for part in PARTS}]
    if unknown:
        raise ValueError(f"unknown part {', '.join(unknown)}; allowed: {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or part.name in names]


def cap(part: Part, parts: Sequence[Part], total: float) -> float:
    """Return the most seconds that a part may take in its first turn, its end included.

    Args:
        parts: those of this call; fewer parts have more time each, and one alone has all of it.
        total: seconds of the whole check.
    """
    return total * part.share / min(1.0, sum(other.share for other in parts))


def allowance(part: Part, most: float, left: float) -> float | None:
    """Return the seconds given to a part, so that it ends in time even if it hangs; None: too short to be useful.

    Args:
        most: seconds that it may take, its end included.
        left: seconds that are left of the whole check.
    """
    seconds = min(most, left - _CLOSING_SECONDS) - GRACE_SECONDS - KILL_SECONDS
    return seconds if seconds >= part.least else None


def order(parts: Sequence[Part], finished: Collection[str], failed: Collection[str]) -> list[Part]:
    """Return the parts that a call has to run, given what earlier calls on the same source and device did.

    Args:
        finished: names of parts that have nothing left to do.
        failed: names of parts that failed with something left. They come after what has not been seen at all.
    """
    return sorted((part for part in parts if part.name not in finished), key=lambda part: part.name in failed)

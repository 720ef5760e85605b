"""Evaluations for the tests of the searches: at the top of a module, so that a spawned worker finds them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from effkernels.scaling import Candidate, Stage, StagedNetwork
from effkernels.scaling.families import build_sequential

TINY = StagedNetwork(
    "tiny",
    8,
    (
        Stage("conv", 1, 8, 2, 3, {"activation": "relu"}, deepens=False),
        Stage("inverted_residual", 4, 8, 1, 3, {"expansion": 1, "activation": "relu"}),
    ),
    build_sequential,
)
"""Small enough that counting its cost takes no time."""


def _log(candidate: Candidate) -> None:
    """One line for each call, by whichever process, in the file that the test named."""
    if log := os.environ.get("SEARCH_LOG"):
        with Path(log).open("a") as file:
            file.write(candidate.key + "\n")


def wide_is_good(candidate: Candidate) -> float:
    """Grows with beta alone."""
    _log(candidate)
    return 1 - 1 / (1 + candidate.scaling.beta)


def with_gates(candidate: Candidate) -> float:
    """The share of stages with squeeze-and-excitation; for the search for a baseline, where nothing is scaled."""
    _log(candidate)
    assert isinstance(candidate.network, StagedNetwork)
    stages = candidate.network.stages[1:-1]
    return 0.5 + sum(bool(stage.options["se_ratio"]) for stage in stages) / len(stages) / 2


def slowly_with_gates(candidate: Candidate) -> float:
    """Return the same, long enough to be killed within."""
    accuracy = with_gates(candidate)
    time.sleep(0.3)
    return accuracy


def gates_fail(candidate: Candidate) -> float:
    """Raises for networks with squeeze-and-excitation in every stage."""
    accuracy = with_gates(candidate)
    if accuracy == 1:
        raise RuntimeError("no gates, please")
    return accuracy


def noisy(candidate: Candidate) -> dict[str, float]:
    """Return two seeds whose spread is larger than the difference between candidates."""
    return {"accuracy": 0.9 + candidate.scaling.beta / 1e4, "spread": 0.01, "seeds": 2, "loss": 0.5}


def deep_fails(candidate: Candidate) -> float:
    """Raises for the deepest candidates."""
    if candidate.scaling.alpha > 1.3:
        raise RuntimeError("out of memory, or so")
    return wide_is_good(candidate)


def deep_dies(candidate: Candidate) -> float:
    """Ends its process for the deepest candidates, as the kernel does where memory is short."""
    if candidate.scaling.alpha > 2.1:
        os._exit(137)
    return wide_is_good(candidate)


def slow(candidate: Candidate) -> float:
    """Takes long enough to be killed within."""
    accuracy = wide_is_good(candidate)
    time.sleep(0.3)
    return accuracy


def endless(candidate: Candidate) -> float:
    """Never returns; logs its process."""
    with Path(os.environ["SEARCH_LOG"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    while True:
        time.sleep(1)


def of_its_process(candidate: Candidate) -> dict[str, float]:
    """Return the number of the process, slowly enough that a second worker gets its share."""
    time.sleep(0.3)
    return {"accuracy": wide_is_good(candidate), "process": os.getpid()}


def not_a_number(candidate: Candidate) -> float:
    """Diverged."""
    return float("nan")

"""Step 1 of compound scaling: the search for alpha, beta and gamma (Tan and Le 2019, section 3.3).

The paper fixes phi = 1, supposes twice the FLOPs, and tries a small grid on the baseline. Here the constraint can be
another growth of the FLOPs, or a latency: then every way to grow is scaled as far as the latency allows, and the
networks compared are as fast as each other instead of as large on paper.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from effkernels.models.compound import CompoundScaling
from effkernels.scaling.candidates import Candidate, by_shares, check_constraint, identity, key_of, on_grid
from effkernels.scaling.journal import Journal
from effkernels.scaling.latency import Latency, OutOfReach, Remembered, fit_latency
from effkernels.scaling.network import Network, Rounding, scale
from effkernels.scaling.results import SearchResult, Trial
from effkernels.scaling.runner import Evaluate, Runner, name_of
from effkernels.scaling.workers import Workers

SAMPLERS: tuple[str, ...] = ("grid", "optuna")


def search(
    baseline: Network,
    evaluate: Evaluate | None,
    *,
    constraint: float | str = 2.0,
    tolerance: float = 0.1,
    grid: float = 0.05,
    sampler: str = "grid",
    trials: int = 30,
    seed: int = 0,
    phi: float = 1.0,
    rounding: Rounding | None = None,
    latency: Latency | None = None,
    budget_ms: float | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    workers: int = 1,
    threads: int | None = None,
    backend: str = "processes",
    journal: str | Path | None = None,
    retry_failed: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> SearchResult:
    """Search for the alpha, beta, gamma with which a baseline scales best.

    Args:
        baseline: the network to scale: a `StagedNetwork`, or another library's (`effkernels.scaling.sources`).
        evaluate: called with a `Candidate`, trains it and returns its accuracy, or numbers by name: "accuracy" (what is
            ranked; higher is better) and what else the table should show; "spread" and "seeds" are understood as the
            standard deviation over so many trainings. None: nothing is trained, candidates are ranked by multiply-adds.
        constraint: what alpha * beta^2 * gamma^2 is to be. "latency": each candidate doubles the FLOPs per phi and is
            scaled by the largest phi that keeps within `budget_ms`.
        tolerance: share of the constraint that a point of the grid may miss it by.
        grid: step of alpha, beta, gamma.
        sampler: "grid", or "optuna": Optuna's TPE sampler proposes coefficients that meet the constraint exactly.
        trials: networks that the sampler "optuna" has evaluated.
        seed: of the sampler.
        phi: candidates are scaled by alpha ** phi, beta ** phi, gamma ** phi.
        rounding: how layers, channels and pixels become whole numbers.
        latency: where given, the latency of every candidate is measured or planned too.
        budget_ms: the most milliseconds of a forward where the constraint is "latency".
        num_classes, in_chans: of the networks that are evaluated.
        workers: candidates at a time, each in a process of its own; `evaluate` must then be picklable, that is,
            defined at the top of a module.
        threads: of PyTorch in each worker; None: this process's, divided by the workers.
        backend: "processes", or "ray" for tasks on a cluster.
        journal: a file to which every finished candidate is written, and from which a search that was interrupted goes
            on. One that was begun with other settings is refused.
        retry_failed: evaluate candidates again that failed according to the journal.
        report: called with a line of progress.

    Returns:
        All candidates, the best first; those whose evaluation failed come last with the error.

    Raises:
        ValueError: arguments that do not go together, a journal of another search (`JournalError`), or no candidate.
        ModuleNotFoundError: Optuna or Ray is asked for and not installed.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r}; allowed: {', '.join(SAMPLERS)}")
    if not (math.isfinite(phi) and phi > 0):
        raise ValueError(f"phi={phi}; allowed: above 0")
    if trials < 1:
        raise ValueError(f"trials={trials}; allowed: 1 or more")
    if (constraint == "latency") != (budget_ms is not None) or (constraint == "latency" and latency is None):
        raise ValueError("search: constraint='latency', latency and budget_ms belong together; give all or none of "
                         "constraint and budget_ms")  # fmt: skip
    if isinstance(constraint, str) and constraint != "latency":
        raise ValueError(f"constraint={constraint!r}; allowed: a number above 1, or 'latency'")
    growth = 2.0 if isinstance(constraint, str) else constraint
    check_constraint(growth)
    settings = {
        "search": "coefficients",
        "baseline": fingerprint(baseline),
        "constraint": constraint,
        "budget_ms": budget_ms,
        "latency": latency.description if latency else None,
        "sampler": sampler,
        **({"grid": grid, "tolerance": tolerance} if sampler == "grid" else {"seed": seed}),
        "phi": None if constraint == "latency" else phi,
        "rounding": asdict(rounding or Rounding()),
        "evaluate": name_of(evaluate),
        "num_classes": num_classes,
        "in_chans": in_chans,
    }
    remembered = None if latency is None else Remembered(latency)
    with Journal(journal, settings) as kept, Workers(workers, threads, backend) as pool:
        runner = Runner(evaluate, kept, pool, retry_failed, report, remembered)

        def candidate(way: CompoundScaling) -> Candidate:
            factor = phi
            if budget_ms is not None and remembered is not None:
                factor = _phi_within(baseline, budget_ms, remembered, way, rounding, kept)
            network = scale(baseline, factor, scaling=way, rounding=rounding)
            cost = network.cost(num_classes=num_classes, in_chans=in_chans)
            return Candidate(key_of(way), network, way, factor, cost, num_classes, in_chans)

        if sampler == "grid":
            ways = on_grid(growth, grid=grid, tolerance=tolerance)
            candidates = [runner.with_latency(one) for one in _distinct(candidate, ways, report)]
            runner.run(candidates, len(candidates))
        else:

            def propose(ask: Any) -> Candidate:
                shares = (ask.suggest_float(name, 0.0, 1.0) for name in ("of_depth", "of_rest"))
                return candidate(by_shares(growth, *shares))

            def goal(trial: Trial) -> float | None:
                return float(trial.cost.multiply_adds) if evaluate is None else trial.accuracy

            runner.sample(propose, goal, trials=trials, seed=seed)
    return SearchResult.of(
        runner.finished.values(),
        baseline.name,
        constraint,
        budget_ms,
        latency.description if latency else None,
        name_of(evaluate),
    )


def _phi_within(
    baseline: Network,
    budget_ms: float,
    latency: Remembered,
    scaling: CompoundScaling,
    rounding: Rounding | None,
    journal: Journal,
) -> float:
    """Return the largest phi within a latency; what the journal knows is not measured again."""
    key = key_of(scaling)
    record = journal.get("fit", key)
    if record is None:
        fit = fit_latency(baseline, budget_ms, latency=latency, scaling=scaling, rounding=rounding)
        record = {"phi": fit.phi}
        journal.add("latency", key, {"ms": fit.latency_ms})
        journal.add("fit", key, record)
    return float(record["phi"])


def _distinct(
    candidate: Callable[[CompoundScaling], Candidate], ways: Sequence[CompoundScaling], report: Callable[[str], None]
) -> list[Candidate]:
    """Return the candidates of all coefficients, one of each that round to the same network."""
    found: dict[Hashable, Candidate] = {}
    unfit: OutOfReach | None = None
    for way in ways:
        try:
            one = candidate(way)
        except OutOfReach as error:
            report(f"{key_of(way)} is left out: {error}")
            unfit = error
            continue
        found.setdefault(identity(one.network), one)
    if unfit is not None and not found:
        raise unfit
    report(f"{len(ways)} coefficients under the constraint make {len(found)} different networks")
    return list(found.values())


def fingerprint(network: Network) -> str:
    """Return the name and digest of a network, the same for the same stages, costs and resolution."""
    contents = repr((network.resolution, network.rows(), network.cost()))
    return f"{network.name} {hashlib.sha256(contents.encode()).hexdigest()[:12]}"

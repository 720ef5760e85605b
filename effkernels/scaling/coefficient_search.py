"""Step 1 of compound scaling: the search for alpha, beta and gamma (Tan and Le 2019, section 3.3).

The paper fixes phi = 1, supposes twice the FLOPs, and tries a small grid on the baseline. Here the constraint can be
another growth of the FLOPs, or a latency: then every way to grow is scaled as far as the latency allows, and the
networks compared are as fast as each other instead of as large on paper.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from effkernels.models.compound import CompoundScaling
from effkernels.scaling.candidates import Candidate, by_shares, check_constraint, identity, key_of, on_grid
from effkernels.scaling.journal import Journal
from effkernels.scaling.latency import Latency, OutOfReach, Remembered, fit_latency
from effkernels.scaling.network import Network, Rounding, scale
from effkernels.scaling.results import SearchResult, Trial
from effkernels.scaling.workers import Outcome, run_all

Evaluate = Callable[[Candidate], float | Mapping[str, float]]
SAMPLERS: tuple[str, ...] = ("grid", "optuna")
_ASKS_PER_TRIAL = 20  # a sampler that proposes nothing but known networks has seen the whole space


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
    with Journal(journal, settings) as kept:
        maker = _Maker(baseline, phi, rounding, latency, budget_ms, num_classes, in_chans, kept, {})
        evaluator = _Evaluator(evaluate, kept, retry_failed, workers, threads, backend, report)
        if sampler == "grid":
            ways = on_grid(growth, grid=grid, tolerance=tolerance)
            found = _distinct(maker, ways, report)
            finished = list(evaluator.run(found, total=len(found)))
        else:
            finished = _by_optuna(maker, evaluator, growth, trials, seed, report)
    return SearchResult.of(
        finished, baseline.name, constraint, budget_ms, latency.description if latency else None, name_of(evaluate)
    )


@dataclass
class _Maker:
    """Makes candidates of coefficients; fits and latencies that the journal knows are not measured again."""

    baseline: Network
    phi: float
    rounding: Rounding | None
    latency: Latency | None
    budget_ms: float | None
    num_classes: int
    in_chans: int
    journal: Journal
    known_ms: dict[Hashable, float]

    def __call__(self, scaling: CompoundScaling) -> Candidate:
        key = key_of(scaling)
        phi = self.phi if self.budget_ms is None else self._fit(scaling, key)
        network = scale(self.baseline, phi, scaling=scaling, rounding=self.rounding)
        cost = network.cost(num_classes=self.num_classes, in_chans=self.in_chans)
        return Candidate(key, network, scaling, phi, cost, self.num_classes, self.in_chans)

    def _fit(self, scaling: CompoundScaling, key: str) -> float:
        record = self.journal.get("fit", key)
        if record is None:
            assert self.latency is not None
            assert self.budget_ms is not None
            latency = Remembered(self.latency, self.known_ms)
            fit = fit_latency(self.baseline, self.budget_ms, latency=latency, scaling=scaling, rounding=self.rounding)
            record = {"phi": fit.phi}
            self.journal.add("latency", key, {"ms": fit.latency_ms})
            self.journal.add("fit", key, record)
        return float(record["phi"])

    def with_latency(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its latency, where one was asked for."""
        if self.latency is None:
            return candidate
        record = self.journal.get("latency", candidate.key)
        if record is None:
            record = {"ms": Remembered(self.latency, self.known_ms)(candidate.network)}
            self.journal.add("latency", candidate.key, record)
        return replace(candidate, latency_ms=float(record["ms"]))


def _distinct(maker: _Maker, ways: Sequence[CompoundScaling], report: Callable[[str], None]) -> list[Candidate]:
    """Return the candidates of all coefficients, one of each that round to the same network."""
    found: dict[Hashable, Candidate] = {}
    unfit: OutOfReach | None = None
    for scaling in ways:
        try:
            candidate = maker(scaling)
        except OutOfReach as error:
            report(f"{key_of(scaling)} is left out: {error}")
            unfit = error
            continue
        found.setdefault(identity(candidate.network), candidate)
    if unfit is not None and not found:
        raise unfit
    report(f"{len(ways)} coefficients under the constraint make {len(found)} different networks")
    return [maker.with_latency(candidate) for candidate in found.values()]


@dataclass
class _Evaluator:
    """Evaluates candidates that the journal does not know."""

    evaluate: Evaluate | None
    journal: Journal
    retry_failed: bool
    workers: int
    threads: int | None
    backend: str
    report: Callable[[str], None]
    count: int = 0

    def run(self, candidates: Sequence[Candidate], total: int) -> Iterator[Trial]:
        """Return the trials of the candidates: first those that are known, then the others as they finish."""
        if self.evaluate is None:
            yield from (Trial(candidate, None, {}, None, 0.0, False) for candidate in candidates)
            return
        waiting = []
        for candidate in candidates:
            known = self._known(candidate)
            if known is None:
                waiting.append(candidate)
            else:
                self.count += 1
                yield known
        if len(waiting) < len(candidates):
            self.report(f"{len(candidates) - len(waiting)} of {len(candidates)} are in the journal")
        outcomes = run_all(self.evaluate, waiting, workers=self.workers, threads=self.threads, backend=self.backend)
        for index, outcome in outcomes:
            trial = _trial(waiting[index], outcome)
            record = {"values": trial.values, "error": trial.error, "seconds": round(trial.seconds, 3)}
            self.journal.add("trial", trial.candidate.key, record)
            self.count += 1
            result = trial.error or f"accuracy {trial.accuracy:.4f}"
            self.report(f"{self.count}/{total} {trial.candidate.key}: {result} ({trial.seconds:.1f} s)")
            yield trial

    def _known(self, candidate: Candidate) -> Trial | None:
        record = self.journal.get("trial", candidate.key)
        if record is None or (self.retry_failed and record["error"] is not None):
            return None
        values = record["values"]
        accuracy = values.get("accuracy")
        return Trial(candidate, accuracy, values, record["error"], float(record["seconds"]), True)


def _trial(candidate: Candidate, outcome: Outcome) -> Trial:
    values = dict(outcome.values or {})
    return Trial(candidate, values.get("accuracy"), values, outcome.error, outcome.seconds, False)


def _by_optuna(
    maker: _Maker,
    evaluator: _Evaluator,
    growth: float,
    trials: int,
    seed: int,
    report: Callable[[str], None],
) -> list[Trial]:
    """Candidates proposed by Optuna's TPE sampler.

    Its state is kept nowhere: with one worker the same seed and the same results propose the same coefficients, so that
    a continued search is replayed from the journal.
    """
    optuna = import_optuna()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    finished: dict[Hashable, Trial] = {}
    asked = 0
    while len(finished) < trials and asked < trials * _ASKS_PER_TRIAL:
        wanted: dict[Hashable, Candidate] = {}
        asks: list[tuple[Any, Hashable]] = []
        for _ in range(min(evaluator.workers, trials - len(finished))):
            asked += 1
            ask = study.ask()
            shares = ask.suggest_float("of_depth", 0.0, 1.0), ask.suggest_float("of_rest", 0.0, 1.0)
            candidate = maker(by_shares(growth, *shares))
            key = identity(candidate.network)
            asks.append((ask, key))
            if key not in finished and key not in wanted:
                wanted[key] = maker.with_latency(candidate)
        for trial in evaluator.run(list(wanted.values()), total=trials):
            finished[identity(trial.candidate.network)] = trial
        for ask, key in asks:
            value = finished[key].accuracy
            if value is None and evaluator.evaluate is None:
                value = float(finished[key].candidate.cost.multiply_adds)
            if value is None:
                study.tell(ask, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(ask, value)
    if len(finished) < trials:
        report(f"the sampler proposes nothing new after {len(finished)} networks")
    return list(finished.values())


def import_optuna() -> Any:
    """Optuna, silent; ModuleNotFoundError names the extra to install."""
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this search needs Optuna: pip install 'effkernels[scaling]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def fingerprint(network: Network) -> str:
    """Return the name and digest of a network, the same for the same stages, costs and resolution."""
    contents = repr((network.resolution, network.rows(), network.cost()))
    return f"{network.name} {hashlib.sha256(contents.encode()).hexdigest()[:12]}"


def name_of(evaluate: Callable[..., object] | None) -> str | None:
    """Return the name of an evaluation in a journal: module and name of a function, the repr of a dataclass."""
    if evaluate is None:
        return None
    if isinstance(evaluate, functools.partial):
        bound = [repr(value) for value in evaluate.args] + [f"{k}={v!r}" for k, v in sorted(evaluate.keywords.items())]
        return f"{name_of(evaluate.func)}({', '.join(bound)})"
    if hasattr(evaluate, "__qualname__"):
        return f"{evaluate.__module__}:{evaluate.__qualname__}"
    if hasattr(evaluate, "__dataclass_fields__"):
        return repr(evaluate)
    return f"{type(evaluate).__module__}:{type(evaluate).__qualname__}"

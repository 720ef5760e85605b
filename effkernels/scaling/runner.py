"""The loop of both searches: every candidate is evaluated once, written to the journal and reported.

Optuna only proposes. Its study is in memory, and what the journal knows is put into it when a search continues.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from effkernels.scaling.candidates import Candidate, identity
from effkernels.scaling.journal import Journal
from effkernels.scaling.latency import Remembered
from effkernels.scaling.results import Trial
from effkernels.scaling.workers import Workers

Evaluate = Callable[[Candidate], float | Mapping[str, float]]
Propose = Callable[[Any], Candidate]
"""Make a candidate of an Optuna trial, by its `suggest_` functions."""

_ASKS_PER_TRIAL = 20  # a sampler that proposes nothing but known networks has seen the whole space


def accuracy_of(trial: Trial) -> str:
    """Return the result of a trial in words."""
    return f"accuracy {trial.accuracy:.4f}"


@dataclass
class Runner:
    """Evaluates candidates for one search.

    Attributes:
        evaluate: the user's function; None: nothing is trained.
        journal: keeps what is finished.
        workers: run the evaluations.
        retry_failed: evaluate candidates again that failed according to the journal.
        report: called with a line of progress.
        latency: measures or plans the latency of every candidate, if it is asked for.
        describe: the result of a trial that did not fail, in words.
        finished: the trials by the network's `identity`, in the order in which they were evaluated.
    """

    evaluate: Evaluate | None
    journal: Journal
    workers: Workers
    retry_failed: bool
    report: Callable[[str], None]
    latency: Remembered | None = None
    describe: Callable[[Trial], str] = accuracy_of
    finished: dict[Hashable, Trial] = field(default_factory=dict)

    def with_latency(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its latency, which is measured if the journal does not know it."""
        if self.latency is None:
            return candidate
        record = self.journal.get("latency", candidate.key)
        if record is None:
            record = {"ms": self.latency(candidate.network)}
            self.journal.add("latency", candidate.key, record)
        return replace(candidate, latency_ms=float(record["ms"]))

    def run(
        self,
        candidates: Sequence[Candidate],
        total: int,
        proposals: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Finish candidates: those that the journal knows are taken from there, the others are evaluated.

        Args:
            candidates: of different networks, with their latencies.
            total: number of trials of the search, for the progress.
            proposals: what Optuna proposed, by the candidate's key; None for candidates of a grid.
        """
        if self.evaluate is None:
            self.finished.update({identity(c.network): Trial(c, {}, None, 0.0, False) for c in candidates})
            return
        waiting = []
        for candidate in candidates:
            record = self.journal.get("trial", candidate.key)
            if record is None or (self.retry_failed and record["error"] is not None):
                waiting.append(candidate)
            else:
                self._finish(candidate, record, is_from_journal=True)
        if known := len(candidates) - len(waiting):
            self.report(f"{known} of {len(candidates)} are in the journal")
        for index, outcome in self.workers.run(self.evaluate, waiting):
            candidate = waiting[index]
            record = {
                "values": dict(outcome.values or {}),
                "error": outcome.error,
                "seconds": round(outcome.seconds, 3),
                **({} if proposals is None else {"proposal": proposals[candidate.key]}),
            }
            self.journal.add("trial", candidate.key, record)
            trial = self._finish(candidate, record, is_from_journal=False)
            result = trial.error or self.describe(trial)
            self.report(f"{len(self.finished)}/{total} {candidate.key}: {result} ({trial.seconds:.1f} s)")

    def _finish(self, candidate: Candidate, record: Mapping[str, Any], *, is_from_journal: bool) -> Trial:
        trial = Trial(candidate, record["values"], record["error"], float(record["seconds"]), is_from_journal)
        self.finished[identity(candidate.network)] = trial
        return trial

    def sample(self, propose: Propose, goal: Callable[[Trial], float | None], *, trials: int, seed: int) -> None:
        """Finish candidates that Optuna's TPE sampler proposes, until so many networks are finished.

        Args:
            propose: makes a candidate, without its latency, of an Optuna trial.
            goal: what the sampler maximises; None for a failure.
            trials: networks, those of the journal included.
            seed: of the sampler.

        Raises:
            ModuleNotFoundError: Optuna is not installed.
        """
        optuna = import_optuna()
        known = [record["proposal"] for record in self.journal.records("trial") if "proposal" in record]
        # Other random numbers after every interruption, or the sampler would propose its first networks again.
        sampler = optuna.samplers.TPESampler(seed=seed + len(known))
        study = optuna.create_study(direction="maximize", sampler=sampler)

        def finish(count: int) -> None:
            asks: list[tuple[Any, Hashable]] = []
            wanted: dict[Hashable, Candidate] = {}
            proposals: dict[str, Mapping[str, Any]] = {}
            for _ in range(count):
                ask = study.ask()
                candidate = propose(ask)
                network = identity(candidate.network)
                asks.append((ask, network))
                if network not in self.finished and network not in wanted:
                    wanted[network] = self.with_latency(candidate)
                    proposals[candidate.key] = ask.params
            self.run(list(wanted.values()), trials, proposals)
            for ask, network in asks:
                value = goal(self.finished[network])
                study.tell(ask, value, state=None if value is not None else optuna.trial.TrialState.FAIL)

        for proposal in known:
            study.enqueue_trial(proposal)
        finish(len(known))
        most = trials * _ASKS_PER_TRIAL
        while len(self.finished) < trials and most > 0:
            count = min(self.workers.count, trials - len(self.finished))
            most -= count
            finish(count)
        if len(self.finished) < trials:
            self.report(f"the sampler proposes nothing new after {len(self.finished)} networks")


def import_optuna() -> Any:
    """Return Optuna, silent; ModuleNotFoundError names the extra to install."""
    try:
        optuna = importlib.import_module("optuna")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this search needs Optuna: pip install 'effkernels[scaling]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


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

"""The result of a search: a ranking that says how much of it is noise, as table, JSON and figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effkernels.scaling.candidates import Candidate
from effkernels.scaling.counting import Cost
from effkernels.scaling.figures import scatter
from effkernels.scaling.network import Network
from effkernels.scaling.table import Column, Table, Value

_NOISE = 2.0  # standard errors of a difference below which two candidates count as equal
_SHOWN_APART = ("accuracy", "spread", "seeds")


@dataclass(frozen=True)
class Trial:
    """A candidate and the result of its evaluation.

    Attributes:
        candidate: the network.
        values: all that the evaluation returned; empty if it failed or nothing was evaluated.
        error: the reason of a failure, in one line; None if there was none.
        seconds: duration of the evaluation.
        is_from_journal: the evaluation was in an earlier run.
    """

    candidate: Candidate
    values: Mapping[str, float]
    error: str | None
    seconds: float
    is_from_journal: bool

    @property
    def network(self) -> Network:
        """The network that was evaluated."""
        return self.candidate.network

    @property
    def cost(self) -> Cost:
        """Its counted cost."""
        return self.candidate.cost

    @property
    def latency_ms(self) -> float | None:
        """Its latency, if one was asked for."""
        return self.candidate.latency_ms

    @property
    def accuracy(self) -> float | None:
        """The accuracy that the evaluation returned; None without an evaluation or after a failure."""
        return self.values.get("accuracy")


@dataclass(frozen=True)
class SearchResult:
    """The result of a search for coefficients.

    Attributes:
        trials: the best first; of equal accuracies the cheaper one; failed ones last.
        baseline: name of the network that was scaled.
        constraint: alpha * beta^2 * gamma^2, or "latency".
        budget_ms: of the constraint "latency".
        latency: how latencies are known; None if nobody asked.
        evaluate: name of the evaluation.
    """

    trials: tuple[Trial, ...]
    baseline: str
    constraint: float | str
    budget_ms: float | None
    latency: str | None
    evaluate: str | None

    @classmethod
    def of(
        cls,
        trials: Iterable[Trial],
        baseline: str,
        constraint: float | str,
        budget_ms: float | None,
        latency: str | None,
        evaluate: str | None,
    ) -> SearchResult:
        """Rank trials."""

        def rank(trial: Trial) -> tuple[bool, float, float, str]:
            flops = trial.candidate.cost.multiply_adds
            if evaluate is None:
                return False, -flops, 0.0, trial.candidate.key
            accuracy = -math.inf if trial.accuracy is None else trial.accuracy
            return trial.accuracy is None, -accuracy, flops, trial.candidate.key

        return cls(tuple(sorted(trials, key=rank)), baseline, constraint, budget_ms, latency, evaluate)

    @property
    def best(self) -> Trial | None:
        """The first of the ranking; None if every evaluation failed."""
        return self.trials[0] if self.trials and self.trials[0].error is None else None

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy of one candidate, from the spread over seeds, pooled over all candidates; None: not known."""
        known = [t.values for t in self.trials if t.values.get("seeds", 0) > 1 and "spread" in t.values]
        if not known:
            return None
        freedom = sum(values["seeds"] - 1 for values in known)
        variance = sum((values["seeds"] - 1) * values["spread"] ** 2 for values in known) / freedom
        return math.sqrt(variance / min(values["seeds"] for values in known))

    @property
    def not_told_apart(self) -> tuple[Trial, ...]:
        """Candidates whose accuracy differs from the best's by less than chance explains, the best left out."""
        error, best = self.standard_error, self.best
        if error is None or best is None or best.accuracy is None:
            return ()
        limit = best.accuracy - _NOISE * math.sqrt(2) * error
        return tuple(t for t in self.trials[1:] if t.accuracy is not None and t.accuracy >= limit)

    def table(self) -> Table:
        """Return the ranking."""
        extra = dict.fromkeys(name for t in self.trials for name in t.values if name not in _SHOWN_APART)
        rows = [self._row(number, trial, extra) for number, trial in enumerate(self.trials, 1)]
        columns = [Column("rank", "rank"), Column("alpha", "alpha", ".4g"), Column("beta", "beta", ".4g")]
        columns.append(Column("gamma", "gamma", ".4g"))
        if self.constraint == "latency":
            columns.append(Column("phi", "phi", ".2f"))
        columns += [
            Column("growth", "a b^2 g^2", ".2f"),
            Column("layers", "layers"),
            Column("pixels", "pixels"),
            Column("mflops", "MFLOPs", ".4g"),
            Column("parameters_m", "Mparams", ".3g"),
        ]
        if self.latency is not None:
            columns.append(Column("latency_ms", "ms", ".3g"))
        if self.evaluate is not None:
            columns.append(Column("accuracy", "accuracy", ".4f"))
            if any("spread" in trial.values for trial in self.trials):
                columns += [Column("spread", "spread", ".4f"), Column("seeds", "seeds", ".0f")]
            columns += [Column(name, name, ".4g") for name in extra]
            columns.append(Column("seconds", "s", ".1f"))
        if any(trial.error for trial in self.trials):
            columns.append(Column("error", "error"))
        what = (
            f"within {self.budget_ms:g} ms"
            if self.budget_ms is not None
            else f"alpha beta^2 gamma^2 ~ {self.constraint:g}"
        )
        title = f"{self.baseline}: coefficients of compound scaling, {what}"
        return Table("search", title, tuple(columns), tuple(rows), tuple(self._notes()))

    def _row(self, number: int, trial: Trial, extra: Iterable[str]) -> dict[str, Value]:
        candidate = trial.candidate
        scaling = candidate.scaling
        row: dict[str, Value] = {
            "rank": number,
            "alpha": scaling.alpha,
            "beta": scaling.beta,
            "gamma": scaling.gamma,
            "phi": candidate.phi,
            "growth": scaling.flops(1),
            "layers": sum(stage.layers for stage in candidate.network.rows()),
            "pixels": candidate.network.resolution,
            "mflops": candidate.cost.multiply_adds / 1e6,
            "parameters_m": candidate.cost.parameters / 1e6,
            "latency_ms": candidate.latency_ms,
            "accuracy": trial.accuracy,
            "seconds": trial.seconds,
            "error": trial.error,
        }
        return {**row, **{name: trial.values.get(name) for name in ("spread", "seeds", *extra)}}

    def _notes(self) -> list[str]:
        notes = ["MFLOPs: millions of multiply-adds of one image, counted after rounding."]
        if self.latency is not None:
            notes.append(f"ms: one forward, {self.latency}.")
        if self.evaluate is None:
            return [*notes, "Nothing was trained: the order is that of the multiply-adds."]
        failed = sum(trial.error is not None for trial in self.trials)
        if failed:
            notes.append(f"{failed} of {len(self.trials)} evaluations failed.")
        if self.standard_error is None:
            notes.append("One training each, or no spread reported: how much of the order is chance is not known.")
        else:
            notes.append(
                f"spread: standard deviation over seeds; an accuracy has a standard error of {self.standard_error:.4f} "
                f"(pooled). {len(self.not_told_apart)} candidates are within chance of the best "
                f"({_NOISE:g} standard errors of the difference)."
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking and what belongs to it in plain values, for JSON."""
        best = self.best
        return {
            "baseline": self.baseline,
            "constraint": self.constraint,
            "budget_ms": self.budget_ms,
            "latency": self.latency,
            "evaluate": self.evaluate,
            "standard_error": self.standard_error,
            "best": None if best is None else best.candidate.key,
            "not_told_apart": [trial.candidate.key for trial in self.not_told_apart],
            "trials": [
                {**self._row(number, trial, ()), **trial.values, "key": trial.candidate.key}
                for number, trial in enumerate(self.trials, 1)
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Draw accuracy over multiply-adds, the best marked, into a file; its suffix decides the format.

        Raises:
            ValueError: no accuracy to draw.
            ImportError: matplotlib is not installed.
        """
        points = [(t.candidate.cost.multiply_adds / 1e6, t) for t in self.trials if t.accuracy is not None]
        accuracies = [t.accuracy or 0.0 for _, t in points]
        scatter(
            path,
            [x for x, _ in points],
            accuracies,
            errors=None if self.standard_error is None else [self.standard_error] * len(points),
            labels=(self.table().title, "multiply-adds of one image, millions", "accuracy"),
            best=points[0][1].candidate.key if points else "",
        )

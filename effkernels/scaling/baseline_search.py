"""The search for a baseline: accuracy against cost in one number, over the MBConv space (Tan and Le 2019, section 4).

The paper maximises ACC(m) * (FLOPS(m) / T) ** w with w = -0.07 and gets EfficientNet-B0; the space is MnasNet's (Tan et
al. 2019, section 4.1) as far as it has MBConv. Optuna proposes networks, and its study is a file, so that a search goes
on where it was stopped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effkernels.models.compound import CompoundScaling
from effkernels.scaling.candidates import Candidate
from effkernels.scaling.coefficient_search import Evaluate, import_optuna, name_of
from effkernels.scaling.counting import Cost
from effkernels.scaling.families import build_sequential
from effkernels.scaling.latency import Latency
from effkernels.scaling.network import Stage, StagedNetwork
from effkernels.scaling.results import scatter
from effkernels.scaling.studies import SETTINGS, held, open_study
from effkernels.scaling.table import Column, Table, Value
from effkernels.scaling.workers import Outcome, run_all

WEIGHT = -0.07
_UNSCALED = CompoundScaling(1.0, 1.0, 1.0)
_ASKS_PER_TRIAL = 20  # a sampler that proposes nothing but known networks has seen the whole space
_TARGET, _RESULT = "target", "result"  # attributes of the study, and of a trial


@dataclass(frozen=True)
class SearchSpace:
    """The networks to choose from: a stem, stages of MBConv, a head; for every stage what is listed here.

    Attributes:
        resolution: height and width of the input.
        stem_channels, stem_stride: of the first convolution.
        strides: of the stages, which is how many there are.
        channels: for every stage, the numbers of channels to choose from.
        layers: the numbers of layers of a stage.
        kernel_sizes: of the depthwise convolution.
        expansions: of the 1x1 convolution before it.
        se_ratios: of squeeze-and-excitation; 0 is none.
        skips: whether a layer adds its input where it can.
        head_channels: of the last 1x1 convolution.
        activation: of all layers.

    Raises:
        ValueError: nothing to choose from, or channels for another number of stages.
    """

    resolution: int = 224
    stem_channels: int = 32
    stem_stride: int = 2
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    channels: tuple[tuple[int, ...], ...] = (
        (8, 16, 24),
        (16, 24, 32),
        (32, 40, 48),
        (64, 80, 96),
        (96, 112, 128),
        (160, 192, 224),
        (256, 320, 384),
    )
    layers: tuple[int, ...] = (1, 2, 3, 4)
    kernel_sizes: tuple[int, ...] = (3, 5)
    expansions: tuple[int, ...] = (1, 3, 6)
    se_ratios: tuple[float, ...] = (0.0, 0.25)
    skips: tuple[bool, ...] = (True, False)
    head_channels: int = 1280
    activation: str = "silu"

    def __post_init__(self) -> None:
        if not self.strides or len(self.channels) != len(self.strides):
            raise ValueError(
                f"SearchSpace: {len(self.strides)} strides and channels for {len(self.channels)} stages; allowed: as "
                "many, at least one"
            )
        for name, choices in self.choices().items():
            if not choices:
                raise ValueError(f"SearchSpace: {name} is empty; allowed: one choice or more")

    def choices(self) -> dict[str, tuple[Any, ...]]:
        """Return the choices by name: "channels_0", "layers_0", ..."""
        found: dict[str, tuple[Any, ...]] = {}
        for number, channels in enumerate(self.channels):
            found[f"channels_{number}"] = channels
            for name in ("layers", "kernel_sizes", "expansions", "se_ratios", "skips"):
                found[f"{name}_{number}"] = getattr(self, name)
        return found

    @property
    def size(self) -> int:
        """Return the number of networks in the space."""
        return math.prod(len(choices) for choices in self.choices().values())

    def network(self, chosen: Mapping[str, Any], name: str = "found") -> StagedNetwork:
        """Return the network of a choice: a value for every name of `choices`.

        Raises:
            ValueError: a value that cannot be chosen.
        """
        for key, choices in self.choices().items():
            if chosen.get(key) not in choices:
                raise ValueError(f"SearchSpace: {key}={chosen.get(key)!r}; allowed: {', '.join(map(str, choices))}")
        own: dict[str, Any] = {"activation": self.activation}
        stages = [Stage("conv", 1, self.stem_channels, self.stem_stride, 3, own, deepens=False)]
        for number, stride in enumerate(self.strides):
            options = {
                **own,
                "expansion": chosen[f"expansions_{number}"],
                "se_ratio": chosen[f"se_ratios_{number}"],
                "skip": chosen[f"skips_{number}"],
            }
            size = chosen[f"kernel_sizes_{number}"]
            layers, channels = chosen[f"layers_{number}"], chosen[f"channels_{number}"]
            stages.append(Stage("inverted_residual", layers, channels, stride, size, options))
        stages.append(Stage("conv", 1, self.head_channels, 1, 1, own, deepens=False))
        return StagedNetwork(name, self.resolution, tuple(stages), build_sequential)


DIGITS_SPACE = SearchSpace(
    resolution=16,
    stem_channels=8,
    strides=(1, 2, 2),
    channels=((4, 8, 12), (8, 12, 16), (16, 20, 24)),
    layers=(1, 2, 3),
    head_channels=48,
)
"""For the digits: ten million small networks, each trained in seconds."""


def reward(accuracy: float, cost: float, target: float, weight: float = WEIGHT) -> float:
    """Return the paper's goal: accuracy * (cost / target) ** weight.

    Raises:
        ValueError: a cost or a target that is not positive.
    """
    if not (cost > 0 and target > 0):
        raise ValueError(f"reward: cost={cost}, target={target}; allowed: above 0")
    return float(accuracy * (cost / target) ** weight)


@dataclass(frozen=True)
class BaselineTrial:
    """A network that was tried.

    Attributes:
        number: of the trial in the study.
        network: what was trained.
        cost: counted.
        latency_ms: where latency is the cost.
        values: what the evaluation returned; empty if it failed.
        reward: the goal; None if the evaluation failed.
        error: why it failed.
        seconds: it took.
    """

    number: int
    network: StagedNetwork
    cost: Cost
    latency_ms: float | None
    values: Mapping[str, float]
    reward: float | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class BaselineResult:
    """The result of a search for a baseline.

    Attributes:
        trials: by reward, the best first; failed ones last.
        cost: "multiply_adds", or how the latency is known.
        target: T, in multiply-adds or milliseconds.
        weight: w.
        evaluate: name of the evaluation.
        space_size: how many networks the space has.
    """

    trials: tuple[BaselineTrial, ...]
    cost: str
    target: float
    weight: float
    evaluate: str | None
    space_size: int

    @property
    def best(self) -> BaselineTrial | None:
        """The first of the ranking; None if every evaluation failed."""
        return self.trials[0] if self.trials and self.trials[0].reward is not None else None

    @property
    def is_by_latency(self) -> bool:
        """Return whether the cost is a latency."""
        return self.cost != "multiply_adds"

    def table(self, most: int | None = 10) -> Table:
        """Return the ranking, or its first lines."""
        rows = [self._row(number, trial) for number, trial in enumerate(self.trials[:most], 1)]
        columns = [
            Column("rank", "rank"),
            Column("trial", "trial"),
            Column("reward", "reward", ".4f"),
            Column("accuracy", "accuracy", ".4f"),
            Column("mflops", "MFLOPs", ".4g"),
            Column("parameters_m", "Mparams", ".3g"),
        ]
        if self.is_by_latency:
            columns.append(Column("latency_ms", "ms", ".3g"))
        columns.append(Column("stages", "stages: layers x expansion, kernel, channels"))
        if any(row["error"] for row in rows):
            columns.append(Column("error", "error"))
        what = f"{self.target:g} ms" if self.is_by_latency else f"{self.target / 1e6:.4g} MFLOPs"
        notes = [
            f"reward: accuracy * (cost / T)^{self.weight:g}, T = {what}. {len(self.trials)} of "
            f"{self.space_size:.3g} networks were tried.",
            "stages: 2x6k5c16 is 2 layers, expansion 6, kernel 5x5, 16 channels; s squeeze-and-excitation, - no "
            "residual.",
        ]
        if self.is_by_latency:
            notes.append(f"ms: one forward, {self.cost}.")
        return Table("baseline", "Search for a baseline", tuple(columns), tuple(rows), tuple(notes))

    def _row(self, rank: int, trial: BaselineTrial) -> dict[str, Value]:
        return {
            "rank": rank,
            "trial": trial.number,
            "reward": trial.reward,
            "accuracy": trial.values.get("accuracy"),
            "mflops": trial.cost.multiply_adds / 1e6,
            "parameters_m": trial.cost.parameters / 1e6,
            "latency_ms": trial.latency_ms,
            "stages": describe(trial.network),
            "error": trial.error,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking in plain values, for JSON."""
        return {
            "cost": self.cost,
            "target": self.target,
            "weight": self.weight,
            "evaluate": self.evaluate,
            "space_size": self.space_size,
            "trials": [
                {**self._row(rank, trial), **trial.values, "seconds": trial.seconds}
                for rank, trial in enumerate(self.trials, 1)
            ],
        }

    def plot(self, path: str | Path) -> None:
        """Draw accuracy over cost, the best reward marked, into a file; ValueError where nothing was evaluated."""
        points = [trial for trial in self.trials if trial.reward is not None]
        costs = [t.latency_ms or 0.0 if self.is_by_latency else t.cost.multiply_adds / 1e6 for t in points]
        of_cost = "milliseconds of a forward" if self.is_by_latency else "multiply-adds of one image, millions"
        scatter(
            path,
            costs,
            [trial.values["accuracy"] for trial in points],
            errors=None,
            labels=(f"Search for a baseline: {len(points)} networks", of_cost, "accuracy"),
            best=describe(points[0].network) if points else "",
        )


def describe(network: StagedNetwork) -> str:
    """Return the stages of MBConv in short: "1x1k3c8 2x6k5c16s"."""
    words = []
    for stage in network.stages[1:-1]:
        marks = ("s" if stage.options.get("se_ratio") else "") + ("" if stage.options.get("skip", True) else "-")
        words.append(f"{stage.layers}x{stage.options['expansion']}k{stage.kernel_size}c{stage.channels}{marks}")
    return " ".join(words)


def search_baseline(
    evaluate: Evaluate,
    *,
    space: SearchSpace = DIGITS_SPACE,
    trials: int = 40,
    target: float | None = None,
    weight: float = WEIGHT,
    latency: Latency | None = None,
    num_classes: int = 10,
    in_chans: int = 1,
    seed: int = 0,
    workers: int = 1,
    threads: int | None = None,
    backend: str = "processes",
    study: str | Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> BaselineResult:
    """Search a space of MBConv networks for the one with the best accuracy * (cost / target) ** weight.

    Optuna's TPE sampler proposes networks. One that was proposed before is not evaluated again.

    Args:
        evaluate: as of `effkernels.scaling.search`.
        space: the networks.
        trials: networks that have been evaluated when the search ends, those of earlier runs of the study included.
        target: T: multiply-adds of one image, or milliseconds; it multiplies all rewards alike and changes no order.
            None: the cost of the network of every first choice.
        weight: w, at most 0: doubling the cost has to pay with a factor of 2 ** -w in accuracy.
        latency: makes the measured or planned latency the cost; None: multiply-adds.
        num_classes, in_chans: of the networks.
        seed: of the sampler.
        workers, threads, backend: as of `effkernels.scaling.search`.
        study: a file with Optuna's study, from which an interrupted search continues. A trial that was under way
            is repeated. A study of another search is refused.
        report: called with a line of progress.

    Raises:
        ValueError: an argument that is out of its range, a study of another search, or one that another process is
            writing to.
        OSError: the study cannot be written to.
        ModuleNotFoundError: Optuna is not installed.
    """
    if trials < 1:
        raise ValueError(f"trials={trials}; allowed: 1 or more")
    if not (math.isfinite(weight) and weight <= 0):
        raise ValueError(f"weight={weight}; allowed: at most 0")
    if target is not None and not target > 0:
        raise ValueError(f"target={target}; allowed: above 0")
    settings = {
        "space": repr(space),
        "target": target,
        "weight": weight,
        "cost": latency.description if latency else "multiply_adds",
        "evaluate": name_of(evaluate),
        "num_classes": num_classes,
        "in_chans": in_chans,
    }
    optuna = import_optuna()
    with contextlib.nullcontext() if study is None else held(Path(study)):
        opened = open_study(optuna, study, settings)
        run = _Run(optuna, opened, evaluate, space, weight, latency, num_classes, in_chans, report)
        run.prepare(seed)
        run.until(trials, workers, threads, backend)
        return run.result()


@dataclass
class _Run:
    """One search under way: the study, and what its trials mean."""

    optuna: Any
    study: Any
    evaluate: Evaluate
    space: SearchSpace
    weight: float
    latency: Latency | None
    num_classes: int
    in_chans: int
    report: Callable[[str], None]

    def prepare(self, seed: int) -> None:
        """Settle T, take up what an earlier run left, and seed the sampler."""
        if self.study.user_attrs.get(_TARGET) is None:
            given = self.study.user_attrs[SETTINGS]["target"]
            self.study.set_user_attr(_TARGET, given or self._first_cost())
        for trial in self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            if _RESULT in trial.user_attrs:  # killed between its result and its end
                self._end(trial.number, trial.user_attrs[_RESULT])
                continue
            self.study.tell(trial.number, state=self._states.FAIL)
            if trial.params:
                self.study.enqueue_trial(trial.params)
        trials = len(self.study.get_trials(deepcopy=False))
        # Other random numbers after every interruption, or the sampler would propose its first networks again.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed + trials)
        if tried := len(self._tried()):
            self.report(f"{tried} networks are in the study")

    def _first_cost(self) -> float:
        chosen = {name: choices[0] for name, choices in self.space.choices().items()}
        candidate = self._candidate(self.space.network(chosen, "first"))
        return _cost_of(asdict(candidate.cost), candidate.latency_ms)

    @property
    def _states(self) -> Any:
        return self.optuna.trial.TrialState

    @property
    def target(self) -> float:
        """T."""
        return float(self.study.user_attrs[_TARGET])

    def _tried(self) -> dict[StagedNetwork, Any]:
        """Trials of the study by network, of each the one that was evaluated."""
        trials = [trial for trial in self.study.get_trials(deepcopy=False) if _RESULT in trial.user_attrs]
        return {self.space.network(trial.params, f"trial {trial.number}"): trial for trial in trials}

    def until(self, trials: int, workers: int, threads: int | None, backend: str) -> None:
        """Evaluate networks until so many are."""
        asked = 0
        while len(tried := self._tried()) < trials and asked < trials * _ASKS_PER_TRIAL:
            waiting: list[tuple[Any, Candidate]] = []
            for _ in range(min(workers, trials - len(tried))):
                asked += 1
                ask = self.study.ask()
                chosen = {name: ask.suggest_categorical(name, of) for name, of in self.space.choices().items()}
                network = self.space.network(chosen, f"trial {ask.number}")
                if network in tried:
                    self._end(ask.number, tried[network].user_attrs[_RESULT])
                elif any(network == other.network for _, other in waiting):
                    self.study.tell(ask, state=self._states.FAIL)
                else:
                    waiting.append((ask, self._candidate(network)))
            candidates = [candidate for _, candidate in waiting]
            outcomes = run_all(self.evaluate, candidates, workers=workers, threads=threads, backend=backend)
            for done, (index, outcome) in enumerate(outcomes, len(tried) + 1):
                self._tell(*waiting[index], outcome, f"{done}/{trials}")
        if len(tried) < trials:
            self.report(f"the sampler proposes nothing new after {len(tried)} networks")

    def _candidate(self, network: StagedNetwork) -> Candidate:
        cost = network.cost(num_classes=self.num_classes, in_chans=self.in_chans)
        ms = None if self.latency is None else self.latency(network)
        return Candidate(network.name, network, _UNSCALED, 0.0, cost, self.num_classes, self.in_chans, ms)

    def _tell(self, ask: Any, candidate: Candidate, outcome: Outcome, position: str) -> None:
        result = {
            "values": None if outcome.values is None else dict(outcome.values),
            "cost": asdict(candidate.cost),
            "latency_ms": candidate.latency_ms,
            "error": outcome.error,
            "seconds": round(outcome.seconds, 3),
        }
        ask.set_user_attr(_RESULT, result)  # all at once: a trial has a result or has none
        value = self._end(ask.number, result)
        told = outcome.error
        if value is not None and outcome.values is not None:
            told = f"accuracy {outcome.values['accuracy']:.4f}, reward {value:.4f} ({outcome.seconds:.1f} s)"
        assert isinstance(candidate.network, StagedNetwork)
        self.report(f"{position} {describe(candidate.network)}: {told}")

    def _end(self, number: int, result: Mapping[str, Any]) -> float | None:
        """End a trial of the study by the result of its network."""
        value = self._reward(result)
        if value is None:
            self.study.tell(number, state=self._states.FAIL)
        else:
            self.study.tell(number, value)
        return value

    def _reward(self, result: Mapping[str, Any]) -> float | None:
        if result["values"] is None:
            return None
        cost = _cost_of(result["cost"], result["latency_ms"])
        return reward(result["values"]["accuracy"], cost, self.target, self.weight)

    def result(self) -> BaselineResult:
        """Return the ranking of all trials of the study that were evaluated."""
        found = sorted(self._trials(), key=lambda t: (t.reward is None, -(t.reward or 0.0), t.cost.multiply_adds))
        cost = "multiply_adds" if self.latency is None else self.latency.description
        return BaselineResult(tuple(found), cost, self.target, self.weight, name_of(self.evaluate), self.space.size)

    def _trials(self) -> Iterator[BaselineTrial]:
        for network, trial in self._tried().items():
            result = trial.user_attrs[_RESULT]
            yield BaselineTrial(
                trial.number,
                network,
                Cost(**result["cost"]),
                result["latency_ms"],
                result["values"] or {},
                self._reward(result),
                result["error"],
                float(result["seconds"]),
            )


def _cost_of(counted: Mapping[str, int], latency_ms: float | None) -> float:
    """Return the cost that the reward is about."""
    return float(counted["multiply_adds"]) if latency_ms is None else latency_ms

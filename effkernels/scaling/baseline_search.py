"""The search for a baseline: accuracy against cost in one number, over the MBConv space (Tan and Le 2019, section 4).

The paper maximises ACC(m) * (FLOPS(m) / T) ** w with w = -0.07 and gets EfficientNet-B0; the space is MnasNet's (Tan et
al. 2019, section 4.1) as far as it has MBConv. Optuna proposes networks, and its study is a file, so that a search goes
on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effkernels.models.compound import CompoundScaling
from effkernels.scaling.candidates import Candidate
from effkernels.scaling.families import build_sequential
from effkernels.scaling.figures import scatter
from effkernels.scaling.journal import Journal
from effkernels.scaling.latency import Latency, Remembered
from effkernels.scaling.network import Stage, StagedNetwork
from effkernels.scaling.results import Trial
from effkernels.scaling.runner import Evaluate, Runner, accuracy_of, name_of
from effkernels.scaling.table import Column, Table, Value
from effkernels.scaling.workers import Workers

WEIGHT = -0.07
_UNSCALED = CompoundScaling(1.0, 1.0, 1.0)


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
class BaselineTrial(Trial):
    """A network that was evaluated.

    Attributes:
        number: 1 for the first network that was evaluated.
        reward: the goal; None if the evaluation failed.
    """

    number: int
    reward: float | None


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
            "stages: 2x6k5c16 is 2 layers, expansion 6, kernel 5x5, 16 channels; s.25 squeeze-and-excitation of that "
            "ratio, - no residual.",
        ]
        if self.is_by_latency:
            notes.append(f"ms: one forward, {self.cost}.")
        return Table("baseline", "Search for a baseline", tuple(columns), tuple(rows), tuple(notes))

    def _row(self, rank: int, trial: BaselineTrial) -> dict[str, Value]:
        return {
            "rank": rank,
            "trial": trial.number,
            "reward": trial.reward,
            "accuracy": trial.accuracy,
            "mflops": trial.cost.multiply_adds / 1e6,
            "parameters_m": trial.cost.parameters / 1e6,
            "latency_ms": trial.latency_ms,
            "stages": trial.candidate.key,
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
            best=points[0].candidate.key if points else "",
        )


def describe(network: StagedNetwork) -> str:
    """Return the stages of MBConv in short: "1x1k3c8 2x6k5c16s.25"."""
    words = []
    for stage in network.stages[1:-1]:
        ratio = stage.options.get("se_ratio")
        gate = f"s{ratio:g}".replace("0.", ".") if ratio else ""
        skip = "" if stage.options.get("skip", True) else "-"
        words.append(f"{stage.layers}x{stage.options['expansion']}k{stage.kernel_size}c{stage.channels}{gate}{skip}")
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
    journal: str | Path | None = None,
    retry_failed: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> BaselineResult:
    """Search a space of MBConv networks for the one with the best accuracy * (cost / target) ** weight.

    Optuna's TPE sampler proposes networks. One that was proposed before is not evaluated again.

    Args:
        evaluate: as of `effkernels.scaling.search`.
        space: the networks.
        trials: networks that have been evaluated when the search ends, those of the journal included.
        target: T: multiply-adds of one image, or milliseconds; it multiplies all rewards alike and changes no order.
            None: the cost of the network of every first choice.
        weight: w, at most 0: doubling the cost has to pay with a factor of 2 ** -w in accuracy.
        latency: makes the measured or planned latency the cost; None: multiply-adds.
        num_classes, in_chans: of the networks.
        seed: of the sampler.
        workers, threads, backend, journal, retry_failed: as of `effkernels.scaling.search`.
        report: called with a line of progress.

    Raises:
        ValueError: an argument that is out of its range, or a journal of another search (`JournalError`).
        OSError: the journal cannot be written to.
        ModuleNotFoundError: Optuna is not installed.
    """
    if trials < 1:
        raise ValueError(f"trials={trials}; allowed: 1 or more")
    if not (math.isfinite(weight) and weight <= 0):
        raise ValueError(f"weight={weight}; allowed: at most 0")
    if target is not None and not target > 0:
        raise ValueError(f"target={target}; allowed: above 0")
    cost = latency.description if latency else "multiply_adds"
    settings = {
        "search": "baseline",
        "space": repr(space),
        "target": target,
        "weight": weight,
        "cost": cost,
        "evaluate": name_of(evaluate),
        "num_classes": num_classes,
        "in_chans": in_chans,
    }
    choices = space.choices()

    def candidate(chosen: Mapping[str, Any]) -> Candidate:
        network = space.network(chosen)
        counted = network.cost(num_classes=num_classes, in_chans=in_chans)
        return Candidate(describe(network), network, _UNSCALED, 0.0, counted, num_classes, in_chans)

    def cost_of(one: Candidate | Trial) -> float:
        return float(one.cost.multiply_adds) if one.latency_ms is None else one.latency_ms

    def goal(trial: Trial) -> float | None:
        return None if trial.accuracy is None else reward(trial.accuracy, cost_of(trial), aim, weight)

    def in_words(trial: Trial) -> str:
        return f"{accuracy_of(trial)}, reward {goal(trial):.4f}"

    with Journal(journal, settings) as kept, Workers(workers, threads, backend) as pool:
        remembered = None if latency is None else Remembered(latency)
        runner = Runner(evaluate, kept, pool, retry_failed, report, remembered, in_words)
        first = candidate({name: of[0] for name, of in choices.items()})
        aim = target or cost_of(runner.with_latency(first))
        runner.sample(
            lambda ask: candidate({name: ask.suggest_categorical(name, of) for name, of in choices.items()}),
            goal,
            trials=trials,
            seed=seed,
        )
    found = [
        BaselineTrial(**vars(trial), number=number, reward=goal(trial))
        for number, trial in enumerate(runner.finished.values(), 1)
    ]
    found.sort(key=lambda trial: (trial.reward is None, -(trial.reward or 0.0), trial.cost.multiply_adds))
    return BaselineResult(tuple(found), cost, aim, weight, name_of(evaluate), space.size)

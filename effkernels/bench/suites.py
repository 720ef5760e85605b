"""The cases of a suite: operators, blocks and networks of any model, and the latency of single requests."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from effkernels import environment
from effkernels.bench import (
    block_cases,
    contenders,
    kernelbench,
    layer_cases,
    op_cases,
    overhead,
    paper_cases,
    train_cases,
)
from effkernels.bench.block_cases import blocks_of, measure_block
from effkernels.bench.measure import Options, Refusal
from effkernels.bench.network_case import NetworkCase
from effkernels.bench.networks import case_name, network_case, run_case, steps
from effkernels.bench.op_calls import calls_of
from effkernels.bench.op_cases import backend_of, dtype_name, measure_op
from effkernels.bench.precision import Precision
from effkernels.bench.timing import Row
from effkernels.models.sources import find_model
from effkernels.ops.call import OpCall

DEFAULT_CONTENDERS = ("effkernels", "eager", "eager-channels-last", "compile")
# Of a model of another library, which this package's own networks are not.
FOREIGN_CONTENDERS = ("optimized", "eager", "eager-channels-last", "compile")


class Measure(Protocol):
    """Measures one case; see `networks.run_case`."""

    def __call__(
        self,
        options: Options,
        *,
        date: str,
        advance: Callable[[str], None],
        report: Callable[[str], None],
    ) -> tuple[list[Row], list[Refusal]]:
        """Return rows, and the contenders that did not run."""


@dataclass(frozen=True)
class SuiteCase:
    """One case of a suite.

    Attributes:
        suite, case, dtype, batch: as the rows have them.
        device: as the rows have it.
        contenders: names of those that are to be compared.
        options: how it is measured.
        measure: measures it.
        unavailable: returns why a contender cannot run it, in one line, or None.
    """

    suite: str
    case: str
    dtype: str
    batch: int
    device: str
    contenders: tuple[str, ...]
    options: Options
    measure: Measure
    unavailable: Callable[[str], str | None]

    @property
    def title(self) -> str:
        """Return the case in words, as ``--filter`` sees it."""
        return f"{self.suite} {self.case}, {self.dtype}, batch {self.batch}"

    @property
    def steps(self) -> int:
        """Return how often `measure` calls ``advance``."""
        if self.suite in ("model", "latency"):
            return steps(self.contenders, self.options)
        return len(self.contenders) * self.options.rounds

    def matches(self, patterns: Sequence[str]) -> bool:
        """Return whether one of the patterns is a part of the title, or a shell pattern of the whole of it."""
        return not patterns or any(text in self.title or fnmatch.fnmatch(self.title, text) for text in patterns)

    def rows_in(self, rows: Sequence[Row]) -> list[Row]:
        """Return the newest rows of this case among some, measured on this device with this code and these versions.

        Empty if one of the contenders that can run is missing: a ratio counts only inside of one run.
        """
        commit, dirty = environment.commit()
        versions = environment.versions().items()
        own = [
            row
            for row in rows
            if (row.suite, row.case, row.dtype, row.batch) == (self.suite, self.case, self.dtype, self.batch)
            and row.device == self.device
            and (row.commit, row.dirty) == (commit, dirty)
            and versions <= row.versions.items()
        ]
        newest = max((row.date for row in own), default="")
        own = [row for row in own if row.date == newest]
        names = {row.name for row in own}
        complete = all(name in names or self.unavailable(name) for name in self.contenders)
        return own if complete else []


@dataclass(frozen=True)
class Settings:
    """What the cases of all suites are made from.

    Attributes:
        models: of the forms of `effkernels.models.sources.find_model`.
        batches: images in a call; the latency suite has 1.
        precisions: of `precision.PRECISIONS`.
        img_size: height and width of the networks' images, in pixels; None: each model's own.
        contenders: names, ("all",), or (): the suite's own choice.
    """

    models: tuple[str, ...]
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    device: torch.device
    threads: int
    options: Options
    img_size: int | None = None
    channels_last: bool = False
    contenders: tuple[str, ...] = ()

    @property
    def device_name(self) -> str:
        """The device as rows name it."""
        return environment.device_name(self.device, self.threads)

    def dtypes(self, suite: str) -> Iterator[torch.dtype]:
        """Return the dtypes of the precisions, for a suite without autocast.

        Raises:
            ValueError: a precision is one of autocast.
        """
        for name in self.precisions:
            precision = Precision.of(name, self.device.type)
            if precision.autocast is not None:
                raise ValueError(f"--precision {name}: autocast is for networks; the suite {suite} takes dtypes")
            yield precision.dtype

    def chosen(self, suite: str, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
        """Return the contenders' names for a case.

        Raises:
            ValueError: the suite does not know one of them.
        """
        if not self.contenders:
            return tuple(default)
        if "all" in self.contenders:
            return tuple(known)
        for name in self.contenders:
            if name not in known:
                where = "" if suite == "model" else f" in the suite {suite}"
                raise ValueError(f"--contender {name}: not known{where}; allowed: all, {', '.join(known)}")
        return tuple(dict.fromkeys(self.contenders))


def _networks(settings: Settings, suite: str, batches: Sequence[int], options: Options) -> Iterator[SuiteCase]:
    for model in settings.models:
        default: tuple[str, ...] = DEFAULT_CONTENDERS if find_model(model).is_own else FOREIGN_CONTENDERS
        if suite == "latency":
            default = (*default, "engine")
        known = [name for name, one in contenders.CONTENDERS.items() if settings.device.type in one.devices]
        names = settings.chosen(suite, known if "all" in settings.contenders else list(contenders.CONTENDERS), default)
        for precision in settings.precisions:
            for batch in batches:
                case = _case(settings, model, batch, precision)
                yield SuiteCase(
                    suite, case_name(case), case.numbers.name, batch, settings.device_name, names, options,
                    partial(_run_network, case, names, suite), partial(_network_unavailable, case),
                )  # fmt: skip


def _run_network(
    case: NetworkCase,
    names: Sequence[str],
    suite: str,
    options: Options,
    *,
    date: str,
    advance: Callable[[str], None],
    report: Callable[[str], None],
) -> tuple[list[Row], list[Refusal]]:
    return run_case(case, names, options, date=date, advance=advance, report=report, suite=suite)


def _network_unavailable(case: NetworkCase, name: str) -> str | None:
    return contenders.CONTENDERS[name].unavailable(case)


def _models(settings: Settings) -> Iterator[SuiteCase]:
    return _networks(settings, "model", settings.batches, settings.options)


def _latency(settings: Settings) -> Iterator[SuiteCase]:
    options = dataclasses.replace(settings.options, waited=True, memory=False)
    return _networks(settings, "latency", (1,), options)


def _ops(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("op", list(op_cases.CONTENDERS), list(op_cases.CONTENDERS))
    calls = dict.fromkeys(call for model in settings.models for call in calls_of(model, settings.img_size))
    for dtype in settings.dtypes("op"):
        for batch in settings.batches:
            for call in (call.with_(batch=batch) for call in calls):
                run = partial(measure_op, call, dtype, names, settings.device)
                yield SuiteCase(
                    "op", str(call), dtype_name(dtype), batch, settings.device_name, names, settings.options,
                    _threaded(run, settings.threads), partial(_op_unavailable, call, dtype, settings.device),
                )  # fmt: skip


def _op_unavailable(call: OpCall, dtype: torch.dtype, device: torch.device, name: str) -> str | None:
    if name != "effkernels" or backend_of(call, call.with_(batch=1).arguments(dtype, device)) != "reference":
        return None
    return "no kernel takes this call here (see: effkernels info)"


def _blocks(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("block", list(block_cases.CONTENDERS), list(block_cases.CONTENDERS))
    for model in settings.models:
        for dtype in settings.dtypes("block"):
            for batch in settings.batches:
                for block in blocks_of(model, settings.img_size):
                    run = partial(measure_block, block, batch, dtype, names, settings.device)
                    yield SuiteCase(
                        "block", block.case(batch), dtype_name(dtype), batch, settings.device_name, names,
                        settings.options, _threaded(run, settings.threads), lambda name: None,
                    )  # fmt: skip


def _training(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("train", list(train_cases.CONTENDERS), list(train_cases.CONTENDERS))
    for model in settings.models:
        for precision in settings.precisions:
            for batch in settings.batches:
                case = _case(settings, model, batch, precision)
                run = partial(train_cases.measure_training, case, names)
                yield SuiteCase(
                    "train", case_name(case), case.numbers.name, batch, settings.device_name, names, settings.options,
                    _threaded(run, settings.threads), partial(train_cases.unavailable, case),
                )  # fmt: skip


def _kernelbench(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("kernelbench", list(kernelbench.CONTENDERS), list(kernelbench.CONTENDERS))
    for dtype in settings.dtypes("kernelbench"):
        for problem in kernelbench.PROBLEMS:
            run = partial(kernelbench.measure_problem, problem, problem.batch, dtype, names, settings.device)
            yield SuiteCase(
                "kernelbench", problem.case(problem.batch), dtype_name(dtype), problem.batch, settings.device_name,
                names, settings.options, _threaded(run, settings.threads), lambda name: None,
            )  # fmt: skip


def _overhead(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("overhead", overhead.CONTENDERS, overhead.CONTENDERS)
    run = partial(overhead.measure_overhead, names, settings.device)
    yield SuiteCase(
        "overhead", overhead.CASE, "float32", 1, settings.device_name, names, settings.options,
        _threaded(run, settings.threads), lambda name: None,
    )  # fmt: skip


def _paper(settings: Settings) -> Iterator[SuiteCase]:
    names = settings.chosen("paper", paper_cases.CONTENDERS, paper_cases.DEFAULT)
    device = environment.device_name(torch.device("cpu"), paper_cases.THREADS)
    for pair in paper_cases.PAIRS:
        run = partial(paper_cases.measure_pair, pair, names, img_size=settings.img_size)
        yield SuiteCase(
            "paper", pair.case, "float32", 1, device, names, settings.options, _threaded(run, paper_cases.THREADS),
            partial(paper_cases.unavailable, pair),
        )  # fmt: skip


def _layers(settings: Settings) -> Iterator[SuiteCase]:
    for model in settings.models:
        first = "effkernels" if find_model(model).is_own else "optimized"
        names = settings.chosen("layer", layer_cases.CONTENDERS, (first, "eager", "eager-channels-last"))
        for precision in settings.precisions:
            for batch in settings.batches:
                case = _case(settings, model, batch, precision)
                run = partial(layer_cases.measure_layers, case, names)
                yield SuiteCase(
                    "layer", case_name(case), case.numbers.name, batch, settings.device_name, names, settings.options,
                    _threaded(run, settings.threads), partial(layer_cases.unavailable, case),
                )  # fmt: skip


def _case(settings: Settings, model: str, batch: int, precision: str) -> NetworkCase:
    return network_case(
        model, batch, precision, img_size=settings.img_size, device=settings.device, threads=settings.threads,
        channels_last=settings.channels_last,
    )  # fmt: skip


def _threaded(run: Callable[..., tuple[list[Row], list[Refusal]]], threads: int) -> Measure:
    """Return what measures a case with a number of CPU threads, which is put back afterwards."""

    def measure(options: Options, **more: object) -> tuple[list[Row], list[Refusal]]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run(options, threads=threads, **more)
        finally:
            torch.set_num_threads(before)

    return measure


# A suite is a name and what makes its cases.
SUITES: dict[str, Callable[[Settings], Iterator[SuiteCase]]] = {
    "op": _ops,
    "block": _blocks,
    "layer": _layers,
    "model": _models,
    "latency": _latency,
    "train": _training,
    "kernelbench": _kernelbench,
    "paper": _paper,
    "overhead": _overhead,
}

"""The time of a network layer by layer: every block, what comes before the first one and after the last one.

A hook at the begin and at the end of each block reads the clock while the whole network runs, so that a block finds
the caches as the one before left them. On a GPU the hooks record events.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.block_cases import block_paths
from effkernels.bench.contenders import CONTENDERS as NETWORKS
from effkernels.bench.measure import Options, Refusal, measure
from effkernels.bench.network_case import NetworkCase, ReadyContender
from effkernels.bench.networks import as_run, case_name, prepare
from effkernels.bench.timing import Row

CONTENDERS = ("effkernels", "optimized", "eager", "eager-channels-last")
BEFORE, BETWEEN, AFTER = "before the blocks", "between the blocks", "after the blocks"
# Blocks follow each other at once in most networks: what is between them is listed if it takes more than this share.
_LEAST_BETWEEN = 0.01

Mark = tuple[str, Any]
"""The path of a block ("" at the begin and end of the call), and a time in nanoseconds or an event."""


class Timeline:
    """The marks of the calls of one contender.

    Attributes:
        calls: the marks of each call in their order: begin of the call, begin and end of each block, end of the call.
    """

    def __init__(self, device: torch.device) -> None:
        self.calls: list[list[Mark]] = []
        self._on_gpu = device.type == "cuda"

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def watching(self, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
        """Mark begin and end of each block in the calls of `timed`, while this is active; blocks by their path."""

        def mark(path: str) -> Callable[..., None]:
            return lambda module, *values: self.calls[-1].append((path, self._now()))

        handles = []
        for path, module in blocks.items():
            handles += [module.register_forward_pre_hook(mark(path)), module.register_forward_hook(mark(path))]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def timed(self, run: timing.Run) -> timing.Run:
        """Return the run with a mark at begin and end of each call."""

        def call(number: int) -> None:
            self.calls.append([("", self._now())])
            run(number)
            self.calls[-1].append(("", self._now()))

        return call

    def _us(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) * 1e3 if self._on_gpu else (end - begin) / 1e3)

    def parts(self, call: Sequence[Mark]) -> dict[str, float]:
        """Return the microseconds of each part of a call; together they are the call."""
        found: dict[str, float] = {BEFORE: self._us(call[0][1], call[1][1])}
        between = 0.0
        for number in range(1, len(call) - 2):
            (path, begin), (_, end) = call[number : number + 2]
            if number % 2:
                found[path] = found.get(path, 0.0) + self._us(begin, end)
            else:
                between += self._us(begin, end)
        return {**found, BETWEEN: between, AFTER: self._us(call[-2][1], call[-1][1])}


def parts_by_round(timeline: Timeline, calls: int, rounds: int) -> dict[str, list[float]]:
    """Return the times of each part of the last turns, in microseconds.

    Args:
        calls: that were timed in them; each turn began with one more, which does not count.
        rounds: as many turns.
    """
    marks = timeline.calls[-(calls + rounds) :]
    each = calls // rounds + 1
    counted = [timeline.parts(call) for number, call in enumerate(marks) if number % each]
    found = {part: [call[part] for call in counted] for part in counted[0]}
    if sum(found[BETWEEN]) < _LEAST_BETWEEN * sum(map(sum, found.values())):
        del found[BETWEEN]
    return found


def _blocks(ready: ReadyContender, case: NetworkCase) -> dict[str, nn.Module]:
    """Return the blocks of a contender by their path in the plain network, whatever is around it."""
    assert ready.module is not None
    modules = dict(ready.module.named_modules())
    found = {}
    for path in block_paths(case.model, case.input_size):
        names = [name for name in modules if name == path or name.endswith(f".{path}")]
        if len(names) != 1:
            raise ValueError(f"{ready.label} has {len(names)} modules {path}; 1 is needed")
        found[path] = modules[names[0]]
    if not found:
        raise ValueError(f"{case.model}: no block runs fused, so there is none to time")
    return found


def measure_layers(
    case: NetworkCase,
    contenders: Sequence[str],
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure a network and its parts; arguments and results as of `networks.run_case`.

    The rows of a contender are one of the whole call and one of each part, in the order of the forward.
    """
    all_ready: dict[str, tuple[ReadyContender, float, dict[str, nn.Module]]] = {}
    refusals: list[Refusal] = []
    for name in contenders:
        prepared = prepare(name, case)
        if not isinstance(prepared, str):
            try:
                all_ready[name] = (*prepared, _blocks(prepared[0], case))
                continue
            except ValueError as error:
                prepared = str(error)
        refusals.append(Refusal(name, case_name(case), prepared))
        for _ in range(options.rounds):
            advance(name)
    if not all_ready:
        return [], refusals
    device = case.torch_device
    timelines = {name: Timeline(device) for name in all_ready}
    inputs = timing.input_count(case.images(0).nbytes, environment.last_level_cache_bytes(device))

    with torch.inference_mode(), ExitStack() as watches:
        for name, (_, _, blocks) in all_ready.items():
            watches.enter_context(timelines[name].watching(blocks))
        measured = measure(
            {name: timelines[name].timed(as_run(ready, case, inputs)) for name, (ready, _, _) in all_ready.items()},
            device,
            dataclasses.replace(options, waited=True),
            dtype=case.numbers.computes_in,
            advance=advance,
            report=lambda line: report(f"{case_name(case)}, batch {case.batch}, layers: {line}"),
        )
    rows = []
    for name, (ready, rel_error, _) in all_ready.items():
        whole = measured.times[name]
        times: list[tuple[str | None, list[float]]] = [(None, whole)]
        times += parts_by_round(timelines[name], len(whole), options.rounds).items()
        for part, samples in times:
            row = timing.make_row(
                timing.summarise(samples),
                suite="layer",
                case=case_name(case),
                contender=ready.label,
                device=environment.device_name(device, threads),
                dtype=case.numbers.name,
                batch=case.batch,
                date=date,
                packages=ready.packages,
                rel_error=rel_error if part is None else None,
            )
            of_part = dataclasses.replace(measured, times={name: samples})
            rows.append(dataclasses.replace(row, name=name, part=part, **of_part.fields(name)))
    return rows, refusals


def unavailable(case: NetworkCase, name: str) -> str | None:
    """Return why a contender cannot run a case, in one line, or None."""
    return NETWORKS[name].unavailable(case)

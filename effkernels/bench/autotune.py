"""Measures how the kernels of one call are best cut, and which backend is faster at it: what `effkernels tune` runs.

Candidates are checked before they are timed: the first images against float64 by the rule of `effkernels.ops.parity`,
the others, which repeat them, against these. They are timed in turns, on a GPU in CUDA graphs, all of them briefly and
the best at length. The default takes part twice: what the two differ by is the noise, and less than that is no gain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import effkernels
from effkernels import environment, ops
from effkernels.bench import timing
from effkernels.bench.op_timing import as_run, copied, largest_difference, temporary_graphs, triton_launches
from effkernels.ops import backends, reference
from effkernels.ops.call import OpCall, PreparedCall, in_float64, input_of, prepared, run
from effkernels.ops.parity import Errors, errors
from effkernels.triton import tuned_plan
from effkernels.triton.tuned_plan import EVEN, BackendKey, Comparison, Configuration, Lookup

Timer = Callable[..., "dict[str, list[float]]"]

DEFAULT, AGAIN = "default", "default again"
LEAST_NOISE = 0.01  # a smaller gain is not worth a line of the plan, whatever the noise
_IMAGES = 2  # that differ; the others repeat them
# PyTorch's own error in fewer values than this is a matter of chance: the largest of several draws is taken.
_MANY = 1 << 14
_DRAWS = 4
_FINALISTS = 3
_SCREENING_ROUNDS, _FINAL_ROUNDS = 2, 8


@dataclass(frozen=True)
class Job:
    """One call to tune.

    Attributes:
        call: of a network.
        dtype: of images and matrices.
    """

    call: OpCall
    dtype: torch.dtype

    def __str__(self) -> str:
        """The job in words, the same in every run."""
        return f"{self.call}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def key(self) -> BackendKey:
        """Return the key by which `effkernels.ops.backends.choose` finds the call."""
        arguments = self.call.arguments(self.dtype, "meta")
        call, weight = self.call, arguments.get("weight")
        return backends.key_of(call.op, input_of(arguments), weight, call.stride, call.activation)


@dataclass(frozen=True)
class Result:
    """The answer to one question about one call.

    Attributes:
        call: in words.
        question: "configuration" or "backend".
        before, after: what answers it without and with the tuned plan.
        before_us, after_us: time of a call.
        noise: what two runs of the same differ by, as a share.
        key: what the answer is looked up by, as JSON takes it.
    """

    call: str
    question: str
    before: str
    after: str
    before_us: float
    after_us: float
    noise: float
    key: tuple[Any, ...]


@dataclass
class Outcome:
    """The outcome of one job.

    Attributes:
        results: answers to what was open.
        known: how many answers were there before.
        failed: a line for every wrong result, and for everything that runs without a tuned plan and failed.
        refused: a line for every candidate that does not run on this device, which is no mistake.
    """

    results: list[Result] = field(default_factory=list)
    known: int = 0
    failed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Gain:
    """Time of a contender over that of the default, and the noise of that share."""

    ratio: float
    noise: float

    @property
    def is_faster(self) -> bool:
        """By more than the noise."""
        return self.ratio < 1 - self.noise

    @property
    def is_slower(self) -> bool:
        """By more than the noise."""
        return self.ratio > 1 + self.noise


def jobs(
    calls: Sequence[OpCall], batches: Sequence[int], dtypes: Sequence[torch.dtype], only: Sequence[str] = ()
) -> list[Job]:
    """Return the distinct jobs of some calls; ``only`` names operators, none means all of them."""
    wanted = [call for call in dict.fromkeys(calls) if not only or call.op in only]
    return [Job(call.with_(batch=batch), dtype) for dtype in dtypes for batch in batches for call in wanted]


def gains(times: Mapping[str, Sequence[float]], rounds: int) -> dict[str, Gain]:
    """Compare each contender with `DEFAULT`, round by round, so that a drift of the machine affects both alike.

    Args:
        times: of calls, in the order of `benchmark.time_in_turns`, which has as many of a contender in every round.
    """
    by_round = {name: timing.round_medians(samples, rounds) for name, samples in times.items()}
    default = by_round[DEFAULT]
    twins = [abs(again / first - 1) for first, again in zip(default, by_round[AGAIN], strict=True)]
    noise = max(LEAST_NOISE, statistics.quantiles(twins, n=4)[2] if len(twins) > 1 else twins[0])
    return {
        name: Gain(statistics.median(own / first for own, first in zip(medians, default, strict=True)), noise)
        for name, medians in by_round.items()
    }


class Tuner:
    """Tunes one job after the other on one device.

    Args:
        device: where the calls run.
        plan: what is known already; it grows with every answer.
        force: ask again what is known already.
        timer: times contenders in turns.
        rivals: two backends to compare, the one that `choose` prefers first.
    """

    def __init__(
        self,
        device: torch.device,
        plan: tuned_plan.TunedPlan,
        *,
        force: bool = False,
        timer: Timer = timing.time_in_turns,
        rivals: tuple[str, str] = ("cuda", "triton"),
    ) -> None:
        self.device, self.plan, self.force, self.timer, self.rivals = device, plan, force, timer, rivals

    def lookups(self, job: Job) -> list[Lookup]:
        """Return what the Triton kernels of a call look up in the tuned plan, without a launch; empty if none runs."""
        asked: list[Lookup] = []
        key = job.key
        if not backends.can_run_triton(key.op, device=self.device, dtype=job.dtype, kernel_size=key.kernel_size).ok:
            return asked
        call = prepared(ops, job.call.op, job.call.arguments(job.dtype, self.device, images=1))
        listening = tuned_plan.answering(lambda lookup: asked.append(lookup))
        with torch.inference_mode(), effkernels.backend("triton"), triton_launches(launch=False), listening:
            call()
        return list(dict.fromkeys(asked))

    def why_no_comparison(self, job: Job) -> str:
        """Return why the backends cannot be compared at a call; "" where they can."""
        key = job.key
        can_run = {"cuda": backends.can_run_cuda, "triton": backends.can_run_triton, "cpu": backends.can_run_cpu}
        for name in self.rivals:
            decision = can_run[name](
                key.op, device=self.device, dtype=getattr(torch, key.dtype), kernel_size=key.kernel_size
            )
            if not decision.ok:
                return f"{name} cannot run {key.op}: {decision.reason}"
        return ""

    def is_known(self, lookup: Lookup) -> bool:
        """Return whether the plan has the answer."""
        return lookup.key in self.plan.configurations

    def run(self, job: Job) -> Outcome:
        """Answer everything that is still open about a call; `plan` has the answers then."""
        outcome = Outcome()
        with torch.inference_mode():
            open_lookups = [one for one in self.lookups(job) if len(one.candidates) > 1]
            compares = not self.why_no_comparison(job)
            wanted = [one for one in open_lookups if self.force or not self.is_known(one)]
            outcome.known = len(open_lookups) - len(wanted)
            known_calls = self.plan.comparisons.get(job.key, {})
            trial = None
            for lookup in wanted:
                trial = trial or _Trial(job, self.device)
                with temporary_graphs():
                    self._configuration(trial, lookup, outcome)
            if compares and (self.force or wanted or str(job) not in known_calls):
                trial = trial or _Trial(job, self.device)
                with temporary_graphs():
                    self._comparison(trial, outcome)
            elif compares:
                outcome.known += 1
        return outcome

    # ------------------------------------------------------------------------------------------------ configurations

    def _configuration(self, trial: _Trial, lookup: Lookup, outcome: Outcome) -> None:
        default, *others = lookup.candidates
        contenders = {DEFAULT: default, **{_words(one): one for one in others}}
        calls: dict[str, list[Callable[[], object]]] = {}
        for name, candidate in contenders.items():
            found = trial.checked("triton", partial(self._answer_with, lookup, candidate), name, outcome)
            if found is not None:
                calls[name] = found
            elif name == DEFAULT:
                return  # there is nothing to compare with
        medians = self._time({**calls}, trial, _SCREENING_ROUNDS)
        best = sorted((name for name in calls if name != DEFAULT), key=lambda name: statistics.median(medians[name]))
        finalists = {name: calls[name] for name in (DEFAULT, *best[:_FINALISTS])}
        times = self._time({**finalists, AGAIN: calls[DEFAULT]}, trial, _FINAL_ROUNDS)
        gained = gains(times, _FINAL_ROUNDS)
        name = min((name for name in finalists), key=lambda name: gained[name].ratio)
        if not gained[name].is_faster:
            name = DEFAULT
        us = {key: round(statistics.median(samples), 3) for key, samples in times.items()}
        choice = None if name == DEFAULT else tuple(contenders[name])
        self.plan.configurations[lookup.key] = Configuration(choice, us[DEFAULT], us[name])
        outcome.results.append(
            Result(
                trial.name, "configuration", _words(default), _words(contenders[name]), us[DEFAULT], us[name],
                round(gained[DEFAULT].noise, 4), tuple(lookup.key),
            )
        )  # fmt: skip

    def _answer_with(self, wanted: Lookup, candidate: tuple[int, ...], lookup: Lookup) -> tuple[int, ...] | None:
        return candidate if lookup.key == wanted.key else self._answer(lookup)

    def _answer(self, lookup: Lookup) -> tuple[int, ...] | None:
        found = self.plan.configurations.get(lookup.key)
        return None if found is None else found.choice

    # ------------------------------------------------------------------------------------------------------ backends

    def _comparison(self, trial: _Trial, outcome: Outcome) -> None:
        preferred, other = self.rivals
        calls = {}
        for name in self.rivals:
            found = trial.checked(name, self._answer, name, outcome)
            if found is None:
                return
            calls[name] = found
        runs = {DEFAULT: calls[preferred], other: calls[other], AGAIN: calls[preferred]}
        times = self._time(runs, trial, _FINAL_ROUNDS)
        gain = gains(times, _FINAL_ROUNDS)[other]
        winner = other if gain.is_faster else preferred if gain.is_slower else EVEN
        if self.device.type == "cuda":
            # A choice does not know whether it is captured into a graph: who is started slowly must not win.
            plainly = gains(self._time(runs, trial, _FINAL_ROUNDS, graphs=False), _FINAL_ROUNDS)[other]
            if winner == other and plainly.is_slower:
                winner = preferred if not plainly.is_faster else EVEN
        us = {preferred: statistics.median(times[DEFAULT]), other: statistics.median(times[other])}
        us = {name: round(median, 3) for name, median in us.items()}
        key = trial.job.key
        self.plan.comparisons.setdefault(key, {})[trial.name] = Comparison(winner, us)
        chosen = self.plan.faster_backends().get(key, preferred)
        outcome.results.append(
            Result(
                trial.name, "backend", preferred, chosen, us[preferred], us[chosen], round(gain.noise, 4), tuple(key)
            )
        )  # fmt: skip

    def _time(
        self, calls: Mapping[str, Sequence[Callable[[], object]]], trial: _Trial, rounds: int, graphs: bool = True
    ) -> dict[str, list[float]]:
        """Times of a call in microseconds."""
        in_graphs = graphs and self.device.type == "cuda"
        if in_graphs:
            runs = {name: as_run(each, self.device, trial.pool) for name, each in calls.items()}
        else:
            runs = {name: _one_by_one(each) for name, each in calls.items()}
        times = self.timer(runs, device=self.device, warmup=1, rounds=rounds)
        count = trial.copies if in_graphs else 1
        return {name: [time / count for time in samples] for name, samples in times.items()}


def _one_by_one(calls: Sequence[Callable[[], object]]) -> timing.Run:
    return lambda number: calls[number % len(calls)]()


def _words(choice: tuple[int, ...]) -> str:
    """Return a NamedTuple without its name: 'rows 64, columns 32'."""
    fields = getattr(choice, "_fields", ())
    return ", ".join(f"{name} {value}" for name, value in zip(fields, choice, strict=True)) or str(tuple(choice))


class _Trial:
    """A job with its tensors on the device, several sets of them, so that none is in the cache when its turn comes."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device, self.name = job, device, str(job)
        call, dtype = job.call, job.dtype
        self.images = min(call.batch, _IMAGES)
        few = call.with_(batch=self.images).arguments(dtype, device)
        self.truth = run(reference, call.op, in_float64(few))
        self.limits = _limits(few, self.truth, job, device)
        self.copies = timing.input_count(call.bytes_moved(dtype), environment.last_level_cache_bytes(device))
        arguments = call.arguments(dtype, device, images=self.images)
        self.calls = [prepared(ops, call.op, copied(arguments)) for _ in range(self.copies)]
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def checked(
        self, backend: str, answer: tuned_plan.Answer, what: str, outcome: Outcome
    ) -> list[Callable[[], object]] | None:
        """Return a backend's calls with its look-ups answered; None, with a note, if it is wrong or does not run."""

        def answered(call: PreparedCall) -> tuple[Tensor, ...]:
            with effkernels.backend(backend), tuned_plan.answering(answer):
                return call()

        try:
            results = answered(self.calls[0])
        except Exception as failure:  # shared memory, a compiler's error: the others are still wanted
            reason = " ".join(str(failure).split())[:200]
            lines = outcome.failed if what in (DEFAULT, *backends.BACKENDS) else outcome.refused
            lines.append(f"{self.name}: {what}: {type(failure).__name__}: {reason}")
            return None
        for result, true, limit in zip(results, self.truth, self.limits, strict=True):
            error = errors(result[: self.images], true)
            if not (error.l2 <= limit.l2 and error.largest <= limit.largest):
                found = (
                    f"error {error.l2:.1e} (largest {error.largest:.1e}), limit {limit.l2:.1e} ({limit.largest:.1e})"
                )
                outcome.failed.append(f"{self.name}: {what}: wrong: {found}")
                return None
            # Two results that keep to the limit differ by no more than twice the limit.
            apart, most = largest_difference(result, self.images), 2 * limit.largest * float(true.abs().max())
            if not apart <= most:
                line = f"{what}: wrong: equal images have results {apart:.1e} apart, limit {most:.1e}"
                outcome.failed.append(f"{self.name}: {line}")
                return None
        return [partial(answered, call) for call in self.calls]


def _limits(arguments: Mapping[str, Any], truth: Sequence[Tensor], job: Job, device: torch.device) -> list[Errors]:
    """Return the error limit of each result: twice what PyTorch's is, and one rounding (effkernels.ops.parity)."""
    op = job.call.op
    plain = run(reference, op, arguments)
    own = [[errors(one, true)] for one, true in zip(plain, truth, strict=True)]
    if min(true.numel() for true in truth) < _MANY:
        for seed in range(1, _DRAWS):
            others = job.call.with_(batch=len(truth[0])).arguments(job.dtype, device, seed=seed)
            pairs = zip(run(reference, op, others), run(reference, op, in_float64(others)), strict=True)
            for found, (one, true) in zip(own, pairs, strict=True):
                found.append(errors(one, true))
    roundings = [torch.finfo(one.dtype).eps / 2 for one in plain]
    return [
        Errors(2 * max(e.l2 for e in found) + rounding, 2 * max(e.largest for e in found) + rounding)
        for found, rounding in zip(own, roundings, strict=True)
    ]

"""Measuring what the tuned plan says, with injected times: which candidates are timed, judged, kept and written."""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import op_cases
import pytest
import test_triton_gates as gates
import torch
from kept_results import kept
from test_tuning import CPU
from test_tuning import cache as cache

import effkernels
from effkernels import ops, triton
from effkernels.bench import autotune, op_timing
from effkernels.bench.autotune import AGAIN, DEFAULT, Job, Tuner
from effkernels.bench.op_calls import calls_of
from effkernels.cli import main
from effkernels.ops import backends, reference
from effkernels.ops.call import OpCall, in_float64, prepared, run
from effkernels.triton import tuned_plan
from effkernels.triton.tuned_plan import EVEN, BackendKey, Comparison, Configuration, ConfigurationKey, TunedPlan


def test_noise_is_what_two_runs_of_the_same_differ_by() -> None:
    quiet = {DEFAULT: [10.0] * 8, AGAIN: [10.0] * 8, "a": [9.8] * 8, "b": [9.95] * 8}
    gained = autotune.gains(quiet, 8)
    assert gained["a"].is_faster
    assert not gained["b"].is_faster, "less than the least that counts"
    noisy = {**quiet, AGAIN: [10.0, 11.0, 9.0, 10.5, 10.6, 9.4, 10.4, 10.0]}
    assert autotune.gains(noisy, 8)["a"].noise > 0.03
    assert not autotune.gains(noisy, 8)["a"].is_faster
    slow = autotune.gains({**quiet, "c": [10.2] * 8}, 8)["c"]
    assert slow.is_slower
    assert not slow.is_faster


def test_contenders_are_compared_round_by_round() -> None:
    """A machine that slows down meets all of a round alike."""
    drift = [1.0, 2.0, 4.0, 8.0]
    times = {DEFAULT: drift, AGAIN: [1.01 * t for t in drift], "a": [0.8 * t for t in drift]}
    gained = autotune.gains(times, 4)
    assert gained["a"].ratio == pytest.approx(0.8)
    assert gained["a"].is_faster


def test_samples_of_a_round_count_by_their_median() -> None:
    samples = [1.0, 1.0, 90.0, 1.0, 1.0, 90.0]  # two rounds of three samples
    assert autotune.gains({DEFAULT: samples, AGAIN: samples, "a": [0.5] * 2}, 2)["a"].ratio == pytest.approx(0.5)


def test_jobs_are_distinct() -> None:
    calls = [SMALL["pointwise_bn_act"], SMALL["conv_bn_act"]]
    found = autotune.jobs([*calls, *calls], [1, 2], [torch.float16])
    assert len(found) == len(set(found)) == 4
    assert {job.call.op for job in autotune.jobs(calls, [1], [torch.float16], ["conv_bn_act"])} == {"conv_bn_act"}


SMALL = {
    call.op: call
    for call in (
        OpCall.on("depthwise_bn_act", (3, 8, 4, 5), stride=2, activation="relu"),
        OpCall.on("depthwise_bn_act_squeeze", (3, 8, 4, 5), 5),
        OpCall.on("depthwise_bn_act_gate", (3, 8, 4, 5)),
        OpCall.on("depthwise_bn_act_se", (3, 8, 4, 5)),
        OpCall.on("squeeze_excite_gate", (3, 8)),
        OpCall.on("pointwise_bn_act", (3, 24, 5, 5), out_channels=70, activation="identity", gated=True, residual=True),
        OpCall.on("pointwise_bn_act_pool", (3, 24, 5, 5), out_channels=70),
        OpCall.on("expand_depthwise_squeeze", (3, 8, 4, 5), out_channels=16),
        OpCall.on("mbconv", (3, 8, 4, 5), out_channels=8, expanded=16),
        OpCall.on("conv_bn_act", (3, 3, 9, 9), out_channels=16, stride=2),
    )
}


@pytest.mark.parametrize("op", backends.OPERATORS)
def test_backends_are_known_by_what_the_operator_asks_for(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preference that is written under one key and looked up under another would never be found."""
    asked: list[BackendKey] = []

    def choose(*arguments: Any, **options: Any) -> str:
        asked.append(backends.key_of(*arguments[:5], **options))  # without the backend
        return "reference"

    for found in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"effkernels.ops.{found.name}")
        if hasattr(module, "choose"):
            monkeypatch.setattr(module, "choose", choose)
    run(ops, op, SMALL[op].arguments(torch.bfloat16))
    assert asked == [Job(SMALL[op], torch.bfloat16).key]


def test_calls_of_a_network_are_at_the_size_asked_for() -> None:
    if not (triton.INSTALLED or backends._library.is_loaded()):
        pytest.skip("needs the shape functions of Triton's or the compiled operators")
    calls = calls_of("efficientnet_b0", 64)
    assert len(calls) == len(set(calls))
    assert [str(call) for call in calls if call.op == "conv_bn_act"] == ["conv_bn_act 1x3x64x64 3x3 stride 2 to 32"]
    assert "squeeze_excite_gate" not in {call.op for call in calls}, "only what the network calls by itself"
    assert {call.activation for call in calls if call.op.startswith("depthwise")} == {"silu"}


def test_equal_images_with_other_results_are_found() -> None:
    x = torch.arange(4.0).repeat(5, 1)
    assert op_timing.largest_difference(x, 2) == 0
    assert op_timing.largest_difference(x[:1], 2) == 0, "one image repeats none"
    x[4, 1] += 0.5
    assert op_timing.largest_difference(x, 2) == 0.5
    x[3, 0] = torch.nan
    assert math.isnan(op_timing.largest_difference(x, 2))


class Stopwatch:
    """Return a timer with given times by name, which runs every contender once unless asked not to."""

    def __init__(self, us: Mapping[str, float], default: float = 10.0, runs: bool = True) -> None:
        self.us, self.default, self.runs = us, default, runs
        self.seen: list[list[str]] = []

    def __call__(self, runs: Mapping[str, Callable[[int], object]], **options: Any) -> dict[str, list[float]]:
        self.seen.append(list(runs))
        for timed in runs.values() if self.runs else ():
            timed(0)
        return {name: [self.us.get(name, self.default)] * options["rounds"] for name in runs}


def tuned(
    call: OpCall, timer: Stopwatch, plan: TunedPlan | None = None, **options: Any
) -> tuple[TunedPlan, autotune.Outcome]:
    plan = plan or TunedPlan("triton interpreter")
    outcome = Tuner(CPU, plan, timer=timer, **options).run(Job(call, torch.float32))
    return plan, outcome


@pytest.mark.usefixtures("interpreted", "one_thread")
class TestTuning:
    """In a process where Triton interprets its kernels: real look-ups and results, injected times."""

    OTHER = "rows 32, columns 32, step 16, warps 4, stages 3"  # of the call below; its default has more rows

    def call(self) -> OpCall:
        return SMALL["pointwise_bn_act"]

    def test_keeps_the_fastest_candidate(self) -> None:
        plan, outcome = tuned(self.call(), Stopwatch({self.OTHER: 5.0}))
        ((key, found),) = plan.configurations.items()
        assert key == ConfigurationKey("pointwise_bn_act", "float32", (3, 25, 24, 70, 1, 1, 1))
        assert found == Configuration((32, 32, 16, 4, 3), 10.0, 5.0)
        (result,) = outcome.results
        assert (result.question, result.after, result.before_us, result.after_us) == (
            "configuration",
            self.OTHER,
            10,
            5,
        )
        assert result.before != result.after
        assert outcome.failed == outcome.refused == []

    def test_times_all_briefly_and_the_best_at_length_beside_the_default_twice(self) -> None:
        timer = Stopwatch({self.OTHER: 5.0})
        tuned(self.call(), timer)
        screened, final = timer.seen
        assert len(screened) > 5
        assert final[:2] == [DEFAULT, self.OTHER]
        assert final[-1] == AGAIN
        assert len(final) == 5

    def test_keeps_the_default_where_nothing_is_faster_by_more_than_the_noise(self) -> None:
        plan, outcome = tuned(self.call(), Stopwatch({self.OTHER: 9.95}))
        (found,) = plan.configurations.values()
        assert found.choice is None
        assert outcome.results[0].after == outcome.results[0].before

    def test_does_not_ask_again_unless_forced(self) -> None:
        plan, _ = tuned(self.call(), Stopwatch({}))
        timer = Stopwatch({self.OTHER: 5.0})
        _, outcome = tuned(self.call(), timer, plan)
        assert (outcome.results, outcome.known, timer.seen) == ([], 1, [])
        _, outcome = tuned(self.call(), timer, plan, force=True)
        assert len(outcome.results) == 1
        assert next(iter(plan.configurations.values())).choice == (32, 32, 16, 4, 3)

    def test_a_wrong_candidate_is_reported_and_never_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.triton import _launch

        run = _launch.run

        def wrong(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
            run(kernel, grid, *arguments, **options)
            if options["ROWS"] == 32:
                arguments[9].mul_(1.001)  # y

        monkeypatch.setattr(_launch, "run", wrong)
        timer = Stopwatch({self.OTHER: 5.0})
        plan, outcome = tuned(self.call(), timer)
        assert any(line.startswith("pointwise_bn_act 3x24x5x5 to 70") and self.OTHER in line for line in outcome.failed)
        assert all("wrong: error" in line for line in outcome.failed)
        assert self.OTHER not in timer.seen[0]
        assert next(iter(plan.configurations.values())).choice is None

    def test_a_candidate_that_is_wrong_for_later_images_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.triton import _launch

        run = _launch.run

        def wrong(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
            run(kernel, grid, *arguments, **options)
            if options["ROWS"] == 32:
                arguments[9][2] *= 1.001

        monkeypatch.setattr(_launch, "run", wrong)
        _, outcome = tuned(self.call(), Stopwatch({self.OTHER: 5.0}))
        assert outcome.failed
        assert all("equal images have results" in line for line in outcome.failed)

    def test_a_candidate_that_does_not_run_is_no_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.triton import _launch

        run = _launch.run

        def refuse(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
            if options["ROWS"] == 32:
                raise RuntimeError("out of resource: shared memory")
            run(kernel, grid, *arguments, **options)

        monkeypatch.setattr(_launch, "run", refuse)
        plan, outcome = tuned(self.call(), Stopwatch({self.OTHER: 5.0}))
        assert outcome.failed == []
        assert any("RuntimeError: out of resource: shared memory" in line for line in outcome.refused)
        assert next(iter(plan.configurations.values())).choice is None

    def test_a_default_that_is_wrong_is_a_failure_and_nothing_is_tuned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.triton import _launch

        monkeypatch.setattr(_launch, "run", lambda kernel, grid, *arguments, **options: arguments[9].zero_())
        plan, outcome = tuned(self.call(), Stopwatch({}))
        assert len(outcome.failed) == 1
        assert "default: wrong" in outcome.failed[0]
        assert plan.configurations == {}

    @pytest.mark.parametrize(
        ("us", "winner"), [({"triton": 5.0}, "triton"), ({"triton": 20.0}, "cpu"), ({"triton": 10.05}, EVEN)]
    )
    def test_backends_are_compared(self, us: dict[str, float], winner: str, compiled: None) -> None:
        call = SMALL["squeeze_excite_gate"]  # nothing to cut differently
        plan, outcome = tuned(call, Stopwatch(us), rivals=("cpu", "triton"))
        assert plan.configurations == {}
        (comparison,) = plan.comparisons[Job(call, torch.float32).key].values()
        assert comparison == Comparison(winner, {"cpu": 10.0, **us})
        (result,) = outcome.results
        assert (result.question, result.before) == ("backend", "cpu")
        assert result.after == ("triton" if winner == "triton" else "cpu")
        _, again = tuned(call, Stopwatch(us), plan, rivals=("cpu", "triton"))
        assert (again.results, again.known) == ([], 1)

    def test_backends_that_cannot_run_are_not_compared(self) -> None:
        call = SMALL["squeeze_excite_gate"]
        reason = Tuner(CPU, TunedPlan("x")).why_no_comparison(Job(call, torch.float32))
        assert reason.startswith("cuda cannot run squeeze_excite_gate: ")
        assert tuned(call, Stopwatch({}))[1] == autotune.Outcome()

    @pytest.mark.parametrize("op", [op for op in triton.FAMILIES if op in SMALL])
    def test_every_candidate_is_right(self, op: str) -> None:
        """And every look-up is answered by a candidate: all of them run here."""
        timer = Stopwatch({}, runs=False)
        _, outcome = tuned(SMALL[op], timer)
        assert outcome.failed == outcome.refused == []
        asks = op in ("pointwise_bn_act", "conv_bn_act", "mbconv", *op_cases.DEPTHWISE_OPS)
        assert bool(timer.seen) == asks or op == "expand_depthwise_squeeze"

    def test_what_was_tuned_is_what_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.triton import _launch

        launch = _launch.run
        launched: list[dict[str, Any]] = []

        def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
            launched.append(options)
            launch(kernel, grid, *arguments, **options)

        monkeypatch.setattr(_launch, "run", noted)
        arguments = self.call().arguments()
        call = prepared(ops, "pointwise_bn_act", arguments)
        call()
        plan, _ = tuned(self.call(), Stopwatch({self.OTHER: 5.0}))
        tuned_plan.record(plan)
        tuned_plan.forget()
        (y,) = call()
        first, last = launched[0], launched[-1]
        assert (first["ROWS"], first["COLUMNS"]) != (32, 32)
        assert (last["ROWS"], last["COLUMNS"], last["STEP"], last["num_warps"]) == (32, 32, 16, 4)
        (expected,) = run(reference, "pointwise_bn_act", in_float64(arguments))
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)

    def test_look_ups_start_nothing(self) -> None:
        from effkernels.triton import _launch

        run = _launch.run
        (lookup,) = Tuner(CPU, TunedPlan("x")).lookups(Job(self.call(), torch.float32))
        assert lookup.key.op == "pointwise_bn_act"
        assert _launch.run is run


@pytest.mark.usefixtures("interpreted", "one_thread")
class TestTheCommandInterpreted:
    ARGUMENTS = ("tune", "--img-size", "32", "--ops", "conv_bn_act", "--precision", "float32")

    @pytest.fixture(autouse=True)
    def fake_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timer = Stopwatch({"rows 128, columns 32, step 32, warps 4": 5.0})
        monkeypatch.setattr("effkernels.commands.tune.Tuner", lambda *a, **k: Tuner(*a, **k, timer=timer))

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        with effkernels.backend("auto"):
            status = main([*self.ARGUMENTS, *arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    def test_tunes_writes_and_resumes(self, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
        status, out, err = self.run(capsys)
        assert status == 0
        assert "times of the interpreter mean nothing" in err
        title, columns, _, row = out.splitlines()
        assert title == "tuned on triton interpreter"
        assert columns.split() == ["call", "before", "us", "after", "us", "gain", "noise"]
        assert row.startswith("conv_bn_act 1x3x32x32 3x3 stride 2 to 32, float32  rows 64, columns 32")
        assert "rows 128, columns 32, step 32, warps 4" in row
        assert "2.00x" in row
        (file,) = cache.glob("*.json")
        assert str(file) in err
        status, out, err = self.run(capsys, "--json")
        report = json.loads(out)
        assert (status, report["results"], report["known"], report["failed"]) == (0, [], 1, [])
        assert report["file"] == str(file)
        status, out, _ = self.run(capsys, "--json", "--force")
        assert [result["after_us"] for result in json.loads(out)["results"]] == [5.0]

    def test_dry_run_measures_nothing(self, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
        status, out, _ = self.run(capsys, "--dry-run", "--json")
        (call,) = json.loads(out)["calls"]
        assert status == 0
        assert (call["call"], call["known"], call["open"]) == (
            "conv_bn_act 1x3x32x32 3x3 stride 2 to 32, float32",
            0,
            1,
        )
        assert call["candidates"] > 4
        assert call["backends"].startswith("cuda cannot run conv_bn_act: ")
        assert not cache.exists()
        assert "to tune on triton interpreter" in self.run(capsys, "--dry-run")[1]

    def test_a_folder_that_cannot_be_made_is_named_before_anything_is_timed(
        self, capsys: pytest.CaptureFixture[str], cache: Path
    ) -> None:
        cache.write_text("a file")
        with pytest.raises(SystemExit) as ended, effkernels.backend("auto"):
            main(list(self.ARGUMENTS))
        assert ended.value.code == 2
        assert f"effkernels tune: {cache} cannot be created: " in capsys.readouterr().err

    def test_clear_forgets(self, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
        self.run(capsys)
        status, out, _ = self.run(capsys, "--clear")
        assert (status, out.startswith("removed ")) == (0, True)
        assert list(cache.glob("*.json")) == []
        assert self.run(capsys, "--clear")[1] == "nothing was tuned on triton interpreter\n"


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.thorough), 3], ids=["all", "every third"])
def test_candidates_compile_and_spill_nothing(every: int, tmp_path: Path) -> None:
    """For sm_80, whose shared memory is the smallest; by the compiler and the disassembler that Triton ships."""
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(tests.parent), str(tests))),
    }
    command = [sys.executable, "-m", "triton_gates.candidates", "80", str(every)]

    def compiled() -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    made_of = {**gates.versions(), "every": str(every)}
    *wrong, last = kept("triton-candidates", gates.SOURCES, made_of, compiled).splitlines()
    assert wrong == []
    assert int(last.split()[0]) * every > 40

"""`make gpu-check` without a GPU: choosing parts, keeping to time, reading other tools' output, writing rows.

What needs a GPU is in tests/gpu; here the code around it runs with fake tools and, where the part allows, on the CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import effkernels
from benchmarks.gpu_check import (
    build,
    common,
    launches,
    measure,
    models,
    ops,
    parity,
    profile,
    runner,
    sanitizer,
    shapes,
    small_calls,
)
from benchmarks.gpu_check.common import FAILED, NOT_AVAILABLE, PASSED, NotAvailable, Options, TimeBox
from benchmarks.gpu_check.runner import Outcome, Part
from effkernels import backends, benchmark, environment, op_timing
from effkernels.benchmark import Row, Statistics, read_rows
from effkernels.op_case import depthwise_case, gate_case, pointwise_case

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


class TestParts:
    def test_run_in_their_order_whatever_the_order_asked_for(self) -> None:
        assert [part.name for part in runner.chosen(["ops", "parity"])] == ["parity", "ops"]
        assert runner.chosen([]) == list(runner.PARTS)

    def test_unknown_ones_are_refused_with_what_is_allowed(self) -> None:
        with pytest.raises(ValueError, match=r"unknown part speed; allowed: build, parity, .*profile"):
            runner.chosen(["parity", "speed"])

    def test_fit_into_twenty_minutes_together_and_eight_alone(self) -> None:
        assert sum(part.seconds for part in runner.PARTS) <= 20 * 60
        assert runner.ALONE_SECONDS <= 8 * 60
        assert all(part.seconds <= runner.ALONE_SECONDS for part in runner.PARTS)

    @pytest.mark.parametrize("part", runner.PARTS, ids=lambda part: part.name)
    def test_are_modules_with_a_command_line(self, part: Part) -> None:
        command = [sys.executable, "-m", f"benchmarks.gpu_check.{part.name}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=common.environment())
        assert done.returncode == 0, done.stderr
        assert "--seconds" in done.stdout


class TestWithoutAGpu:
    @pytest.fixture(autouse=True)
    def no_gpu(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")

    def test_it_says_so_in_one_line_and_ends_with_status_2(self) -> None:
        command = ["make", "--no-print-directory", "-s", "gpu-check", f"PYTHON={sys.executable}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
        assert len(said) == 1, said
        assert said[0].startswith(f"gpu-check: no GPU: torch {torch.__version__} finds none here")

    def test_a_python_without_torch_is_told_how_to_name_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        reason = runner.why_not_here("cuda")
        assert reason is not None
        assert "has no torch; name another Python: make gpu-check PYTHON=" in reason

    @pytest.mark.parametrize("part", [sanitizer.sanitizer, launches.launches, profile.profile])
    def test_parts_that_need_one_are_not_available(self, part: object) -> None:
        with pytest.raises(NotAvailable, match="needs a GPU"):
            part(Options(device="cpu"))  # type: ignore[operator]


class TestOutcome:
    """A part's exit status and last line become a line of the summary."""

    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float = 30.0) -> Outcome:
        script = tmp_path / "part.py"
        script.write_text(textwrap.dedent(body))
        monkeypatch.setattr(runner, "python", lambda *arguments: [sys.executable, str(script)])
        return runner.run_one(Part("fake", "a fake part", seconds), [], seconds, tmp_path / "log")

    @pytest.mark.parametrize(
        ("status", "line", "result", "note"),
        [
            (PASSED, "12 passed", "passed", "12 passed"),
            (FAILED, "failed: 2 wrong", "failed", "2 wrong"),
            (NOT_AVAILABLE, "not available: no ncu", "not available", "no ncu"),
            (139, "Segmentation fault", "failed", "Segmentation fault"),
        ],
    )
    def test_of_a_part(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, line: str, result: str, note: str
    ) -> None:
        outcome = self.run(tmp_path, monkeypatch, f"print('first')\nprint({line!r})\nraise SystemExit({status})")
        assert (outcome.result, outcome.note) == (result, note)
        assert (tmp_path / "log").read_text() == f"\n== fake\nfirst\n{line}\n"

    def test_a_part_that_hangs_is_stopped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        outcome = self.run(tmp_path, monkeypatch, "import time\ntime.sleep(600)", seconds=-15.0)
        assert outcome.result == "failed"
        assert re.fullmatch(r"stopped after \d+ s", outcome.note)

    def test_summary_never_counts_not_available_as_passed(self) -> None:
        outcomes = [Outcome("parity", "passed", 61.2, "12 passed"), Outcome("profile", "not available", 0.4, "no ncu")]
        lines = runner.summary(outcomes).splitlines()
        assert lines[0].split() == ["part", "result", "seconds", "note"]
        assert lines[1].split(maxsplit=3) == ["parity", "passed", "61", "12 passed"]
        assert lines[-1] == "1 passed, 0 failed, 1 not available"

    @pytest.mark.parametrize(("results", "status"), [(["passed", "not available"], 0), (["passed", "failed"], 1)])
    def test_the_whole_check_fails_with_one_part(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Sequence[str], status: int
    ) -> None:
        remaining = iter(results)
        seconds = []

        def run_one(part: Part, arguments: Sequence[str], time: float, log: Path) -> Outcome:
            seconds.append(time)
            return Outcome(part.name, next(remaining), 1.0, "")

        monkeypatch.setattr(runner, "run_one", run_one)
        monkeypatch.setattr(runner, "WORK", tmp_path)
        monkeypatch.setenv("OUT", str(tmp_path))
        assert runner.main(["--device", "cpu", "build", "parity"]) == status
        assert seconds == [part.seconds for part in runner.PARTS[:2]], "each keeps to its share"
        assert (tmp_path / "summary.txt").read_text().startswith("part")

    def test_a_part_alone_has_more_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given = []

        def run_one(part: Part, arguments: Sequence[str], time: float, log: Path) -> Outcome:
            given.append(time)
            return Outcome(part.name, "passed", 1.0, "")

        monkeypatch.setattr(runner, "run_one", run_one)
        monkeypatch.setattr(runner, "WORK", tmp_path)
        monkeypatch.setenv("OUT", str(tmp_path))
        runner.main(["--device", "cpu", "ops"])
        runner.main(["--device", "cpu", "--seconds", "7", "ops", "models"])
        assert given == [runner.ALONE_SECONDS, 7.0, 7.0]

    @pytest.mark.parametrize(
        ("raised", "status", "line"),
        [
            (NotAvailable("no tool"), NOT_AVAILABLE, "not available: no tool"),
            (AssertionError("1 wrong"), FAILED, "failed: 1 wrong"),
            (None, PASSED, "all well"),
        ],
    )
    def test_a_part_ends_with_its_status(
        self, capsys: pytest.CaptureFixture[str], raised: Exception | None, status: int, line: str
    ) -> None:
        def part(options: Options) -> str:
            """A part."""
            if raised:
                raise raised
            return "all well"

        assert common.run_part(part, ["--device", "cpu"]) == status
        assert capsys.readouterr().out.splitlines()[-1] == line


class TestTimeBox:
    def test_leaves_out_what_does_not_fit_and_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        box = TimeBox(10.0)
        assert box.affords("short", 5.0)
        assert not box.affords("long", 20.0)
        assert 9.0 < box.left <= 10.0
        box.report()
        assert capsys.readouterr().out == "left out for lack of time (10 s): 1\n  long\n"

    def test_is_over_when_the_time_is(self) -> None:
        assert not TimeBox(1.0, started=time.monotonic() - 2.0).affords("anything", 0.0)


class TestTools:
    def test_one_that_does_not_start_is_not_available(self) -> None:
        with pytest.raises(NotAvailable, match="does not start"):
            common.tool_output(["/no/such/tool"], 5)

    def test_one_that_does_not_end_is_not_available(self) -> None:
        with pytest.raises(NotAvailable, match="did not end within 1 s"):
            common.tool_output([sys.executable, "-c", "import time; time.sleep(60)"], 1)

    def test_output_and_errors_come_together(self) -> None:
        code = "import os, sys; print(os.environ['MARK']); print('e', file=sys.stderr); sys.exit(3)"
        status, output = common.tool_output([sys.executable, "-c", code], 60, {"MARK": "m"})
        assert status == 3
        assert sorted(output.split()) == ["e", "m"]


class TestBuild:
    def test_asks_the_library(self, compiled: None) -> None:
        assert build.problem() == ""

    def test_says_what_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(build, "_ASK", "raise SystemExit('not there')")
        assert build.problem() == "not there"
        monkeypatch.setattr(build, "_ASK", 'print(\'["", "built for another GPU", []]\')')
        assert build.problem() == "built for another GPU"
        monkeypatch.setattr(build, "_ASK", 'print(\'["", "", ["conv_bn_act"]]\')')
        assert build.problem() == "the library has no CUDA kernel of conv_bn_act"


def test_parity_names_every_file_that_runs_over_the_backends() -> None:
    asking = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if re.search(r"def test_\w+\([^)]*\bbackend\b", file.read_text())
    ]
    assert [file for file in asking if file not in parity.FILES and "emulat" not in file] == []
    assert [file for file in parity.FILES if not (ROOT / file).is_file()] == []


class TestParity:
    @pytest.mark.parametrize(
        ("counted", "status", "stopped", "note"),
        [
            ("12 passed in 3s", 0, False, "12 passed in 3s"),
            ("12 passed in 3s", 2, True, "12 passed in 3s, stopped for lack of time"),
            ("no tests ran in 3s", 2, True, "none passed, stopped for lack of time"),
        ],
    )
    def test_verdict(self, counted: str, status: int, stopped: bool, note: str) -> None:
        assert parity.verdict(counted, status, stopped) == note

    @pytest.mark.parametrize(
        ("counted", "status", "stopped"),
        [("1 failed, 12 passed in 3s", 1, False), ("1 failed, 2 passed in 3s", 2, True), ("3 skipped", 0, False)],
    )
    def test_a_failure_is_one_in_time_or_not(self, counted: str, status: int, stopped: bool) -> None:
        with pytest.raises(AssertionError):
            parity.verdict(counted, status, stopped)

    def test_both_kinds_of_kernels_are_tested_triton_in_what_is_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        asked: list[tuple[str, float | None]] = []

        def run_pytest(*arguments: str, processes: int = 1, seconds: float | None = None) -> str:
            asked.append((arguments[arguments.index("-k") + 1], seconds))
            return "12 passed"

        monkeypatch.setattr(parity, "run_pytest", run_pytest)
        assert parity.parity(Options(seconds=100.0)) == "cuda: 12 passed; triton: 12 passed"
        assert parity.parity(Options(seconds=1.0)) == "cuda: 12 passed; no time for triton"
        assert asked[0] == asked[2] == ("cuda and not emulated", None)
        words, seconds = asked[1]
        assert words == "triton"
        assert seconds is not None
        assert 90 < seconds <= 100

    def test_tests_that_take_too_long_are_stopped_and_counted(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        file = tmp_path / "test_slow.py"
        file.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
        monkeypatch.setattr(parity, "pytest_command", lambda *arguments, processes: common.python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)
        ))  # fmt: skip
        note = parity.run_pytest(seconds=8.0)
        assert re.fullmatch(r"1 passed in .*s.*, stopped for lack of time", note)


class TestSanitizer:
    CLEAN = "========= COMPUTE-SANITIZER\n7 operators called, 0 wrong results\n========= ERROR SUMMARY: 0 errors\n"
    FOUND = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 32 errors\n"
    RACE = "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
    REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n"

    @pytest.mark.parametrize(
        ("output", "errors"), [(CLEAN, 0), (FOUND, 32), (RACE, 2), (REFUSED, None), ("Segmentation fault", None)]
    )
    def test_summaries(self, output: str, errors: int | None) -> None:
        assert sanitizer.read_verdict(output).errors == errors

    def fake(self, tmp_path: Path, planted: str, calls: str, status: int = 0) -> Path:
        """A compute-sanitizer that prints one text for the planted mistake and another for the operators."""
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"""#!{sys.executable}
import sys
planted = sys.argv[3] == "planted"
print({planted!r} if planted else {calls!r})
sys.exit(0 if planted else {status})
""")
        tool.chmod(0o755)
        return tool

    def test_a_clean_run_passes(self, tmp_path: Path) -> None:
        tool = self.fake(tmp_path, self.FOUND, self.CLEAN)
        assert sanitizer.check(tool, "memcheck", Path("planted"), 60) == "memcheck: ERROR SUMMARY: 0 errors"

    def test_a_tool_that_misses_the_planted_mistake_is_not_available(self, tmp_path: Path) -> None:
        for blind in (self.CLEAN, self.REFUSED):
            with pytest.raises(NotAvailable, match="memcheck does not find a planted mistake here"):
                sanitizer.check(self.fake(tmp_path, blind, self.CLEAN), "memcheck", Path("planted"), 60)

    def test_errors_in_the_operators_fail(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="32 errors"):
            sanitizer.check(self.fake(tmp_path, self.FOUND, self.FOUND), "memcheck", Path("planted"), 60)

    def test_a_crash_of_the_calls_fails(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="exit status 1"):
            sanitizer.check(self.fake(tmp_path, self.FOUND, self.CLEAN, 1), "memcheck", Path("planted"), 60)

    def test_no_summary_is_not_available(self, tmp_path: Path) -> None:
        with pytest.raises(NotAvailable, match="no summary"):
            sanitizer.check(self.fake(tmp_path, self.FOUND, "killed"), "memcheck", Path("planted"), 60)

    def test_the_watched_calls_reach_every_operator(self, compiled: None, one_thread: None) -> None:
        assert small_calls.main(["cpu"]) == 0


class TestLaunches:
    def event(self, kind: str, name: str = "kernel") -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=kind), is_user_annotation=name == "note")

    def test_kernels_and_fills_count_and_annotations_do_not(self) -> None:
        events = [self.event("CPU"), self.event("CUDA"), self.event("CUDA", "Memset"), self.event("CUDA", "note")]
        assert launches.device_events(events) == ["kernel", "Memset"]

    @pytest.mark.parametrize(
        ("op", "seen", "counted", "says"),
        [
            ("pointwise_bn_act", ["a"], 1, None),
            ("pointwise_bn_act", ["a", "Memset"], 2, "2 launches where one is promised: a, Memset"),
            ("depthwise_bn_act_se", ["a", "b"], 2, None),
            ("depthwise_bn_act_se", ["a", "b", "c"], None, "3 launches: a, b, c"),
            ("depthwise_bn_act_se", [], None, "0 launches: "),
            ("conv_bn_act", ["a", "Memset"], 1, "the profiler sees 2 launches, 1 were counted: a, Memset"),
        ],
    )
    def test_complaints(self, op: str, seen: list[str], counted: int | None, says: str | None) -> None:
        assert launches.complaint(op, seen, counted) == says


class TestShapes:
    def test_of_b0(self, compiled: None) -> None:
        """The paper's table 1: 12 distinct depthwise convolutions, one stem."""
        calls = shapes.calls_of("efficientnet_b0")
        depthwise = [call for call in calls if call.op.startswith("depthwise")]
        assert len(depthwise) == 12
        assert {(c.channels, c.plane[0], c.kernel, c.stride) for c in depthwise} >= {(32, 112, 3, 1), (1152, 7, 5, 1)}
        assert [(c.channels, c.plane, c.out) for c in calls if c.op == "conv_bn_act"] == [(3, (224, 224), 32)]
        assert shapes.Call("squeeze_excite_gate", 1152, (1, 1), reduced=48, activation="silu") in calls
        expansions = {(c.channels, c.out, c.plane[0]) for c in calls if c.op == "expand_depthwise_squeeze"}
        assert expansions >= {(16, 96, 112), (192, 1152, 7)}
        projects = [call for call in calls if call.op == "pointwise_bn_act" and call.residual]
        assert projects
        assert all(call.gate and call.activation == "identity" for call in projects)

    def test_large_batches_and_the_targets_come_first(self, compiled: None) -> None:
        order = list(shapes.measurements(["efficientnet_b0", "efficientnet_b4"], [1, 32, 256]))
        assert [one.batch for one in order] == sorted((one.batch for one in order), reverse=True)
        assert (order[0].op, order[0].model) == ("depthwise_bn_act_squeeze", "efficientnet_b0")
        assert len(order) == len(set(order))
        for call in shapes.calls_of("efficientnet_b4"):
            if call.op.startswith("depthwise") or call.op in ("squeeze_excite_gate", "pointwise_bn_act"):
                assert {one.batch for one in order if one.call == call} == {1, 32, 256}


def fake_row(contender: str, median_us: float) -> Row:
    return benchmark.make_row(
        Statistics(median_us, median_us, median_us, 5), suite="op", case="depthwise_bn_act_squeeze 256x32x112x112",
        contender=contender, device="A GPU", dtype="bfloat16", batch=256, date="2026-01-02T03:04:05+00:00",
        floor_us=80.0, bytes=1,
    )  # fmt: skip


class _Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class TestOperators:
    def test_enlarged_cases_compute_the_same_images(self, one_thread: None) -> None:
        case = pointwise_case((2, 8, 5, 4), 6, gate=True, residual=True)
        large = op_timing.enlarged(case, 5, torch.float32, CPU)
        assert large.batch == 5
        assert large.shape == "5x8x5x4 to 6, gate, residual"
        assert large.tensors["weight"].shape == (6, 8, 1, 1)
        for name in ("x", "gate", "residual"):
            assert torch.equal(large.tensors[name][:2], large.tensors[name][2:4])
            assert torch.equal(large.tensors[name][:2].double(), case.tensors[name].float().double())

    @pytest.mark.parametrize(
        "case",
        [
            depthwise_case("depthwise_bn_act", (2, 8, 7, 7), 3, 2),
            pointwise_case((2, 8, 5, 4), 6, gate=True),
            gate_case(2, 16),
        ],
        ids=lambda case: case.op,
    )
    def test_contenders_are_timed_after_parity(self, compiled: None, one_thread: None, case: object) -> None:
        large, measured, refused = measure.measure(case, 4, torch.float32, CPU)  # type: ignore[arg-type]
        assert refused == []
        assert large.batch == 4
        names = [one.contender for one in measured]
        assert [name for name in names if name != "effkernels-triton"][:2] == ["effkernels-cpu", "eager-channels-last"]
        for one in measured:
            assert one.statistics.median_us > 0
            assert (one.error is None) == one.contender.endswith(" alone")
            assert one.error is None or one.error < 1e-5

    def test_a_wrong_result_is_refused_and_not_timed(
        self, compiled: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = effkernels.ops.pointwise_bn_act
        monkeypatch.setattr(effkernels.ops, "pointwise_bn_act", lambda *a, **k: right(*a, **k) + 1)
        case = pointwise_case((2, 8, 5, 4), 6)
        _, measured, refused = measure.measure(case, 2, torch.float32, CPU)
        assert "effkernels-cpu" not in [one.contender for one in measured]
        assert [(one.contender, one.ours) for one in refused] == [("effkernels-cpu", True)]
        assert "wrong: error" in refused[0].reason

    def test_the_bare_library_call_is_a_part_of_the_operator(self, one_thread: None) -> None:
        case = depthwise_case("depthwise_bn_act", (2, 8, 7, 6), 5, 2)
        found = measure.bare(case, CPU)
        assert found is not None
        (result,) = case.prepare(found[1], torch.float64, CPU)()
        x, weight = case.tensors["x"], case.tensors["weight"]
        assert torch.allclose(result, torch.nn.functional.conv2d(x, weight, stride=2, padding=2, groups=8))
        assert measure.bare(depthwise_case("depthwise_bn_act", (1, 8, 7, 6), 3, 1, (0, 1, 0, 1)), CPU) is None
        assert measure.bare(gate_case(1, 8), CPU) is None

    def test_rows_carry_bytes_and_floor(self) -> None:
        case = gate_case(2, 16)
        measured = [measure.Measured("effkernels-cuda-graph", Statistics(4.0, 5.0, 6.0, 7), 1e-3, 1)]
        (row,) = measure.rows_of(
            case, measured, dtype=torch.bfloat16, device_name="A GPU", date="2026-01-02T03:04:05+00:00", bandwidth=4e6
        )
        assert (row.suite, row.case, row.contender) == ("op", "squeeze_excite_gate 2x16", "effkernels-cuda-graph")
        assert row.bytes == case.bytes_moved(torch.bfloat16)
        assert row.floor_us == round(row.bytes / 4e6, 3)
        assert (row.launches, row.batch, row.dtype) == (1, 2, "bfloat16")

    def test_the_table_holds_shares_and_ratios(self) -> None:
        rows = [
            fake_row("effkernels-cuda-graph", 100.0),
            fake_row("effkernels-triton-graph", 110.0),
            fake_row("eager-channels-last-graph", 350.0),
            fake_row("compile-graph", 180.0),
            fake_row("compile-max-autotune-graph", 170.0),
            fake_row("cudnn convolution alone-graph", 120.0),
        ]
        title, line = ops.table([rows]).splitlines()
        assert title.split()[-5:] == ["triton", "eager", "compile", "autotune", "library"]
        assert line.split()[2:] == ["100.0", "80%", "1.10x", "3.50x", "1.80x", "1.70x", "1.20x"]
        alone = ops.table([rows[1:4]]).splitlines()[1]
        assert alone.split()[2:] == ["110.0", "73%", "3.18x", "1.64x"]
        assert alone[71:79].strip() == "", "Triton is not compared with itself"

    def test_triton_is_a_contender_beside_the_compiled_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        can = {"cuda": True, "triton": True, "cpu": False}
        for name in can:
            decide = lambda op, name=name, **call: backends.Decision(can[name], "" if can[name] else "no")  # noqa: E731
            monkeypatch.setattr(backends, f"can_run_{name}", decide)
        case = pointwise_case((2, 8, 5, 4), 6)
        names = list(measure.contenders(case, torch.bfloat16, CPU, [None]))
        assert names == ["effkernels-cuda", "effkernels-triton", "eager-channels-last", "product alone", "compile"]
        can["cuda"] = False
        assert list(measure.contenders(case, torch.bfloat16, CPU, []))[:2] == [
            "effkernels-triton",
            "eager-channels-last",
        ]
        can["triton"] = False
        assert next(iter(measure.contenders(case, torch.bfloat16, CPU, []))) == "effkernels-reference"

    def test_a_contender_of_ours_runs_on_its_backend(self, compiled: None) -> None:
        case = pointwise_case((2, 8, 5, 4), 6)
        chosen = []
        module = measure.contenders(case, torch.float32, CPU, [])["effkernels-cpu"].module
        with effkernels.backend("reference"):
            call = case.prepare(module, torch.float32, CPU)
            with _Seen() as seen:
                call()
            chosen += seen.names
            assert backends.selected() == "reference"
        assert "effkernels::pointwise_bn_act" in chosen

    @pytest.mark.usefixtures("interpreted", "one_thread")
    def test_launches_of_triton_are_counted(self) -> None:
        with effkernels.backend("auto"):
            _, measured, refused = measure.measure(gate_case(2, 16), 2, torch.float32, CPU)
        assert refused == []
        assert {one.contender: one.launches for one in measured}["effkernels-triton"] == 1

    def test_without_time_it_fails_and_names_what_was_left_out(
        self, compiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(AssertionError, match="no time for a single case"):
            ops.operators(Options(device="cpu", seconds=0.0, smoke=True, results=tmp_path))
        assert "left out for lack of time (0 s): 8" in capsys.readouterr().out

    @pytest.mark.slow
    def test_smoke(self, compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole part on the CPU at small sizes: a row for every operator, in the smoke test's own file."""
        monkeypatch.setattr("benchmarks.gpu_check.results.WORK", tmp_path)
        note = ops.operators(Options(device="cpu", seconds=300.0, smoke=True, results=tmp_path / "never"))
        assert note.startswith("8 cases, 0 left out")
        (file,) = (tmp_path / "results").glob("*.jsonl")
        assert len({row.case.split()[0] for row in read_rows(file)}) == 8
        assert not (tmp_path / "never").exists()


class TestModels:
    def test_compilers_join_where_there_is_time(self) -> None:
        few = models.contenders_for("cuda", 30.0)
        assert few == ["effkernels", "eager", "eager-channels-last", "effkernels-graph", "eager-channels-last-graph",
                       "timm", "optimized", "engine", "torchvision"]  # fmt: skip
        assert set(models.contenders_for("cuda", 100.0)) - set(few) == {"compile", "compile-graph"}
        everything = models.contenders_for("cuda", 1000.0)
        assert set(everything) - set(few) == set(models._COMPILES)

    def test_table(self) -> None:
        row = fake_row("effkernels-cuda", 100.0)
        lines = models.table([row, fake_row("eager (timm)", 350.0)]).splitlines()
        assert lines[0].split() == ["batch", "256"]
        assert lines[2].split() == ["eager", "(timm)", "350.0"]


class TestProfile:
    HEADER = (
        '"ID","Kernel Name","gpu__time_duration.sum","sm__warps_active.avg.pct_of_peak_sustained_active",'
        '"smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",'
        '"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"'
    )
    REPORT = (
        "==PROF== Connected to process 7\n"
        + HEADER
        + '\n"","","us","%","inst","inst"\n'
        + '"0","void effkernels::cuda::k<__half, 3>(effkernels::P)","1,234.5","71.2","0.25","9.5"\n'
    )

    def test_reads_the_raw_page(self) -> None:
        (kernel,) = profile.read_report(self.REPORT)
        assert kernel == {
            "kernel": "k<float16, 3>",
            "time": "1,234.5 us",
            "occupancy %": "71.2",
            "waits for": "long_scoreboard 9.5, barrier 0.2",
        }

    def test_no_table_is_not_available(self) -> None:
        refused = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n"
        with pytest.raises(NotAvailable, match="Failed to initialize the profiler: LibraryNotLoaded"):
            profile.read_report(refused)
        with pytest.raises(NotAvailable):
            profile.read_report("")


@pytest.mark.parametrize(
    ("told", "commit", "dirty"),
    [
        ("a" * 40, "a" * 40, False),
        ("a" * 40 + "-dirty", "a" * 40, True),
        ("v1.0", None, None),
        ("", None, None),
    ],
)
def test_the_commit_of_a_copy_without_git(
    monkeypatch: pytest.MonkeyPatch, told: str, commit: str | None, dirty: bool | None
) -> None:
    """EFFKERNELS_COMMIT tells it; where git answers, git is believed."""

    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    environment.commit.cache_clear()
    monkeypatch.setenv("EFFKERNELS_COMMIT", told)
    monkeypatch.setattr(subprocess, "run", no_git)
    try:
        assert environment.commit() == (commit, dirty)
    finally:
        environment.commit.cache_clear()

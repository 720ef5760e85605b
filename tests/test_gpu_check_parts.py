"""The parts of `make gpu-check` without a GPU: reading other tools' output, running tests; and each in a dry run."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import effkernels
from benchmarks.gpu_check import build, common, launches, profile, sanitizer, small_calls, tests
from benchmarks.gpu_check.common import Cut, NotAvailable, Options
from benchmarks.gpu_check.progress import MOST_TRIES, PartProgress, Progress
from benchmarks.gpu_check.schedule import PARTS, Part
from effkernels import environment

ROOT = Path(__file__).resolve().parents[1]


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
    assert [file for file in asking if file not in tests.FILES and "emulat" not in file] == []
    assert [file for file in tests.FILES if not (ROOT / file).is_file()] == []


class TestRunsOfTests:
    """Parts that run tests: each test is a step."""

    FILE = """
import time
from pathlib import Path
def test_a(): pass
def test_b(): assert 1 == 2, "b is wrong"
def test_c():
    Path(__file__).with_suffix(".begun").touch()
    time.sleep({seconds})
def test_d(): pass
"""

    @pytest.fixture
    def options(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
        monkeypatch.setattr(tests, "WORK", tmp_path / "work")
        command = tests.pytest_command
        monkeypatch.setattr(
            tests, "pytest_command", lambda *a, processes: command(*a, "--rootdir", str(tmp_path), processes=processes)
        )
        return Options(seconds=60.0, progress=Progress(tmp_path / "progress.jsonl"))

    def run(self, options: Options, tmp_path: Path, *arguments: str, seconds: float = 0.0, processes: int = 1) -> str:
        file = tmp_path / "test_fake.py"
        file.write_text(self.FILE.format(seconds=seconds))
        return tests.run_tests(options, "parity", str(file), *arguments, processes=processes)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_each_is_written_down(self, options: Options, tmp_path: Path, processes: int) -> None:
        note = self.run(options, tmp_path, "-k", "not test_b", processes=processes)
        assert re.fullmatch(r"3 tests; 3 passed.* in .*s", note)
        assert sorted(options.progress.of("parity").done) == [f"test_fake.py::test_{name}" for name in "acd"]

    def test_a_failure_is_named(self, options: Options, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match=r"1 of 4 tests failed, the first: test_fake.py::test_b: .*b is wrong"):
            self.run(options, tmp_path)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_what_takes_too_long_is_cut_and_goes_on_there(
        self, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
    ) -> None:
        given = []

        class RingsInTestC(threading.Thread):
            """A timer that need not wait for its time."""

            def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
                super().__init__(daemon=True)
                self.ring, self.ended = ring, threading.Event()
                given.append(seconds)

            def run(self) -> None:
                while not (begun := (tmp_path / "test_fake.begun").exists()) and not self.ended.is_set():
                    time.sleep(0.05)
                if begun:
                    self.ring()

            def cancel(self) -> None:
                self.ended.set()

        with monkeypatch.context() as patch:
            patch.setattr(tests, "Timer", RingsInTestC)
            with pytest.raises(Cut, match=r"[12] of 3 steps"):
                self.run(options, tmp_path, "-k", "not test_b", seconds=60, processes=processes)
        assert 50.0 < given[0] < 60.0, "a part ends before its time is up"
        done = set(options.progress.of("parity").done)
        assert "test_fake.py::test_a" in done
        note = self.run(options, tmp_path, "-k", "not test_b", processes=processes)
        assert note.startswith("3 tests; ")
        assert f"{3 - len(done)} passed" in note

    def test_the_interrupt_comes_in_time(self) -> None:
        begin = time.monotonic()
        _, status, stopped = tests._run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, {})
        assert stopped
        assert status != 0
        assert time.monotonic() - begin < 30

    def test_a_failure_of_an_earlier_call_stays_one(self, options: Options, tmp_path: Path) -> None:
        for _ in range(2):
            with pytest.raises(AssertionError, match="1 of 4 tests failed"):
                self.run(options, tmp_path)

    def test_none_is_a_failure(self, options: Options, tmp_path: Path) -> None:
        with pytest.raises(AssertionError, match="exit status 5"):
            self.run(options, tmp_path, "-k", "nothing_of_this_name")

    def test_one_that_always_hangs_is_given_up(self) -> None:
        state = PartProgress(["a", "b"], begun={"a": MOST_TRIES, "b": 1}, done={"b": ""})
        with pytest.raises(AssertionError, match="the first: a: began 3 times and never came to its end"):
            tests.verdict("1 passed", 0, False, state)


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
        """Return a compute-sanitizer that prints one text for the planted mistake and another for the operators."""
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

    def test_a_dry_run_sees_operators(self, compiled: None) -> None:
        x, weight = torch.ones(1, 8, 2, 2), torch.ones(8, 8, 1, 1)
        with torch.inference_mode():
            seen = launches.profiled(lambda: effkernels.ops.pointwise_bn_act(x, weight), torch.device("cpu"))
        assert seen == ["effkernels::pointwise_bn_act"]

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


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_dry_run(part: Part, tmp_path: Path) -> None:
    """Each part as the check runs it, on the CPU at tiny sizes, with stand-ins for what needs a GPU."""
    command = common.python("-m", f"benchmarks.gpu_check.{part.name}", "--device", "cpu", "--smoke")
    progress = tmp_path / "progress.jsonl"
    variables = {**common.environment(), "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--seconds", "400", "--progress", str(progress), "--results", str(tmp_path / "never")],
        capture_output=True, text=True, cwd=ROOT, env=variables,
    )  # fmt: skip
    assert done.returncode == common.PASSED, done.stdout[-3000:] + done.stderr[-3000:]
    state = Progress(progress).of(part.name)
    assert state.left == []
    assert bool(state.done) == (part.name not in ("build", "profile", "tune"))
    assert not (tmp_path / "never").exists(), "its rows mean nothing"


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
    """EFFKERNELS_COMMIT names it; if git answers, git's answer is used."""

    def no_git(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("git")

    environment.commit.cache_clear()
    monkeypatch.setenv("EFFKERNELS_COMMIT", told)
    monkeypatch.setattr(subprocess, "run", no_git)
    try:
        assert environment.commit() == (commit, dirty)
    finally:
        environment.commit.cache_clear()

"""`make gpu-check` without a GPU: its schedule, its caps, what it writes down, going on where it was cut.

What needs a GPU is in tests/gpu; the parts are tried in test_gpu_check_parts.py and test_gpu_check_measure.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import common, launches, profile, runner, sanitizer, schedule, wrappers
from benchmarks.gpu_check.common import CUT, FAILED, NOT_AVAILABLE, PASSED, Cut, NotAvailable, Options, Work
from benchmarks.gpu_check.progress import MOST_TRIES, Progress, run_key
from benchmarks.gpu_check.runner import Outcome
from benchmarks.gpu_check.schedule import PARTS, Part

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    made = Progress(tmp_path / "progress.jsonl")
    made.begin("a run")
    return made


class TestSchedule:
    def test_parts_run_in_their_order_whatever_the_order_asked_for(self) -> None:
        assert [part.name for part in schedule.chosen(["ops", "parity", "models"])] == ["models", "ops", "parity"]
        assert schedule.chosen([]) == list(PARTS)

    def test_what_is_most_worth_knowing_comes_first(self) -> None:
        assert [part.name for part in PARTS[:9]] == [
            "build", "wrappers", "launches", "models", "ops", "train_steps", "training", "parity", "profile",
        ]  # fmt: skip
        assert {part.name for part in PARTS[9:]} == {"sanitizer", "triton", "tune"}

    def test_unknown_ones_are_refused_with_what_is_allowed(self) -> None:
        with pytest.raises(ValueError, match=r"unknown part speed; allowed: build, wrappers, .*training"):
            schedule.chosen(["parity", "speed"])

    def test_a_part_alone_has_all_of_the_time(self) -> None:
        for part in PARTS:
            assert schedule.cap(part, [part], 540) == pytest.approx(540)

    def test_two_parts_share_it_in_proportion(self) -> None:
        models, ops = schedule.chosen(["models", "ops"])
        caps = [schedule.cap(part, [models, ops], 540) for part in (models, ops)]
        assert sum(caps) == pytest.approx(540)
        assert caps[0] / caps[1] == pytest.approx(models.share / ops.share)

    @pytest.mark.parametrize("minutes", [2.0, 9.0, 20.0])
    def test_of_all_parts_each_keeps_to_its_share(self, minutes: float) -> None:
        for part in PARTS:
            assert schedule.cap(part, PARTS, 60 * minutes) == pytest.approx(60 * minutes * part.share)

    def test_the_first_four_fit_into_nine_minutes_at_their_caps(self) -> None:
        assert sum(schedule.cap(part, PARTS, 60 * schedule.MINUTES) for part in PARTS[:4]) < 60 * schedule.MINUTES

    def test_an_allowance_leaves_time_to_stop_a_part_that_hangs(self) -> None:
        part = Part("fake", "", 0.5, 10)
        for most, left in ((100.0, 500.0), (100.0, 60.0)):
            seconds = schedule.allowance(part, most, left)
            assert seconds is not None
            assert seconds + schedule.GRACE_SECONDS + schedule.KILL_SECONDS <= min(most, left)

    def test_what_is_not_worth_its_start_is_not_begun(self) -> None:
        part = Part("fake", "", 0.5, 10)
        assert schedule.allowance(part, 100, 15) is None
        assert schedule.allowance(part, 15, 100) is None
        assert schedule.allowance(part, 100, 25) is not None

    def test_finished_parts_are_left_out_and_failed_ones_come_last(self) -> None:
        order = schedule.order(PARTS, finished=["build", "models"], failed=["wrappers"])
        names = [part.name for part in order]
        assert names[0] == "launches"
        assert names[-1] == "wrappers"
        assert "build" not in names
        assert "models" not in names


class TestProgress:
    def test_a_part_that_has_not_begun_has_nothing_to_say(self, progress: Progress) -> None:
        state = progress.of("ops")
        assert (state.planned, state.done, state.finished) == ([], {}, False)
        assert state.how_far() == "before its first step"

    def test_says_how_far_a_part_came(self, progress: Progress) -> None:
        progress.note("ops", planned=["a", "b", "c"])
        assert progress.of("ops").how_far() == "0 of 3 steps, next a"
        progress.note("ops", begun="a", left=9.0)
        progress.note("ops", done="a", wrong="")
        progress.note("ops", begun="b", left=5.0)
        assert progress.of("ops").how_far() == "1 of 3 steps, then in b"
        assert progress.of("ops").left == ["b", "c"]
        assert progress.of("models").planned == [], "each part has its own"

    def test_half_a_line_of_a_killed_process_is_no_step(self, progress: Progress) -> None:
        assert progress.file is not None
        progress.note("ops", planned=["a"])
        with progress.file.open("a") as out:
            out.write('{"part": "ops", "done": "a"')
        assert progress.of("ops").done == {}

    def test_continues_only_the_same_run(self, progress: Progress) -> None:
        progress.note("ops", planned=["a"])
        assert progress.begin("a run")
        assert progress.of("ops").planned == ["a"]
        assert not progress.begin("another run")
        assert progress.of("ops").planned == []

    def test_a_run_is_that_of_a_source(self, tmp_path: Path) -> None:
        (tmp_path / "csrc").mkdir()
        file = tmp_path / "csrc" / "a.cu"
        file.write_text("one")
        before = run_key(tmp_path, ["A GPU"])
        assert run_key(tmp_path, ["A GPU"]) == before
        assert run_key(tmp_path, ["Another GPU"]) != before
        (tmp_path / "csrc" / "a.o").write_text("no source")
        assert run_key(tmp_path, ["A GPU"]) == before
        file.write_text("two")
        assert run_key(tmp_path, ["A GPU"]) != before

    def test_a_step_that_never_ends_is_given_up_and_wrong(self, progress: Progress) -> None:
        for _ in range(MOST_TRIES):
            progress.note("ops", planned=["a", "b"])
            progress.note("ops", begun="a", left=100.0)
        state = progress.of("ops")
        assert state.left == ["b"]
        assert state.wrong == [f"a: began {MOST_TRIES} times and never came to its end"]

    @pytest.mark.parametrize(
        ("result", "done", "finished"),
        [("passed", [], True), ("not available", [], True), ("cut", ["a"], False), ("failed", ["a"], False),
         ("failed", ["a", "b"], True), ("", ["a"], False)],
    )  # fmt: skip
    def test_a_part_is_finished_when_another_turn_would_find_nothing(
        self, progress: Progress, result: str, done: Sequence[str], finished: bool
    ) -> None:
        progress.note("ops", planned=["a", "b"])
        for step in done:
            progress.note("ops", done=step, wrong="")
        if result:
            progress.note("ops", result=result, seconds=1.0, note="")
        assert progress.of("ops").finished == finished

    def test_goes_to_the_folder_that_is_named_by_out(
        self, progress: Progress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setenv("OUT", str(out))
        progress.note("ops", planned=["a"])
        assert json.loads((out / "progress.jsonl").read_text().splitlines()[-1]) == {"part": "ops", "planned": ["a"]}


class TestWork:
    STEPS = {"a": 1, "b": 2, "c": 3}  # noqa: RUF012

    def run(self, progress: Progress, seconds: float, needs: Callable[[int], float] = lambda step: 0.0) -> list[str]:
        work = Work("ops", seconds, progress)
        return [name for name, _ in work.steps(self.STEPS, needs)]

    def test_every_step_is_written_down(self, progress: Progress) -> None:
        work = Work("ops", 100, progress)
        assert [name for name, _ in work.steps(self.STEPS, lambda step: 0.0)] == ["a", "b", "c"]
        assert work.end("three") == "three"
        assert progress.of("ops").left == []

    def test_what_does_not_fit_is_left_for_another_call(self, progress: Progress) -> None:
        work = Work("ops", 100, progress)
        assert [name for name, _ in work.steps(self.STEPS, lambda step: 200.0 if step == 2 else 1.0)] == ["a", "c"]
        with pytest.raises(Cut, match=r"2 of 3 steps, next b; two"):
            work.end("two")
        assert self.run(progress, 300, lambda step: 200.0) == ["b"]

    def test_goes_on_after_what_is_done(self, progress: Progress) -> None:
        for name, _ in Work("ops", 100, progress).steps(self.STEPS, lambda step: 0.0):
            if name == "b":
                break  # as a process that is killed
        assert progress.of("ops").how_far() == "1 of 3 steps, then in b"
        assert self.run(progress, 100) == ["b", "c"]

    def test_a_step_that_was_cut_waits_for_more_time_than_it_had(self, progress: Progress) -> None:
        progress.note("ops", planned=["a", "b", "c"])
        progress.note("ops", begun="a", left=60.0)
        progress.note("ops", result="cut", seconds=70.0, note="")
        assert self.run(progress, 50) == ["b", "c"]
        assert self.run(progress, 70) == ["a"]

    def test_a_step_that_crashed_is_tried_again_at_once(self, progress: Progress) -> None:
        progress.note("ops", planned=["a", "b", "c"])
        progress.note("ops", begun="a", left=60.0)
        progress.note("ops", result="failed", seconds=70.0, note="died by signal 11")
        assert self.run(progress, 50) == ["a", "b", "c"]

    def test_fails_with_what_an_earlier_call_found(self, progress: Progress) -> None:
        progress.note("ops", planned=["a", "b", "c"])
        progress.note("ops", begun="a", left=60.0)
        progress.note("ops", done="a", wrong="a is wrong")
        work = Work("ops", 100, progress)
        for name, _ in work.steps(self.STEPS, lambda step: 0.0):
            if name == "c":
                work.wrong(name, "c is wrong")
        with pytest.raises(AssertionError, match="2 of 3 steps wrong, the first: a is wrong"):
            work.end("")

    def test_the_time_of_a_part_begins_before_its_process(self, progress: Progress) -> None:
        work = Options(seconds=60.0, progress=progress, started=time.monotonic() - 50).work("ops")
        assert [name for name, _ in work.steps(self.STEPS, lambda step: 20.0)] == []
        assert 5 < work.left <= 10

    def test_without_a_file_a_part_runs_alone(self) -> None:
        work = Options(seconds=10).work("ops")
        assert [name for name, _ in work.steps(self.STEPS, lambda step: 0.0)] == ["a", "b", "c"]


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

    @pytest.mark.parametrize("part", [sanitizer.sanitizer, launches.launches, profile.profile, wrappers.wrappers])
    def test_parts_that_need_one_are_not_available(self, part: object) -> None:
        with pytest.raises(NotAvailable, match="needs a GPU"):
            part(Options(device="cpu"))  # type: ignore[operator]


class TestOnePart:
    """A part's exit status and last line become a line of the summary."""

    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, seconds: float = 30.0) -> Outcome:
        script = tmp_path / "part.py"
        script.write_text(textwrap.dedent(body))
        monkeypatch.setattr(runner, "python", lambda *arguments: [sys.executable, str(script)])
        progress = Progress(tmp_path / "progress.jsonl")
        return runner.run_one(Part("fake", "a fake part", 1.0, 1.0), [], seconds, tmp_path / "log", progress)

    @pytest.mark.parametrize(
        ("status", "line", "result", "note"),
        [
            (PASSED, "12 passed", "passed", "12 passed"),
            (FAILED, "failed: 2 wrong", "failed", "2 wrong"),
            (NOT_AVAILABLE, "not available: no ncu", "not available", "no ncu"),
            (CUT, "cut: 3 of 9 steps", "cut", "3 of 9 steps"),
            (139, "Segmentation fault", "failed", "Segmentation fault"),
        ],
    )
    def test_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, line: str, result: str, note: str
    ) -> None:
        outcome = self.run(tmp_path, monkeypatch, f"print('first')\nprint({line!r})\nraise SystemExit({status})")
        assert (outcome.result, outcome.note) == (result, note)
        assert (tmp_path / "log").read_text() == f"\n== fake\nfirst\n{line}\n"

    def test_one_that_dies_says_where(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Progress(tmp_path / "progress.jsonl").note("fake", planned=["a", "b"])
        outcome = self.run(tmp_path, monkeypatch, "import os\nos.kill(os.getpid(), 11)")
        assert (outcome.result, outcome.note) == ("failed", "died by signal 11 at 0 of 2 steps, next a")

    # Neither an exception nor a signal helps against the second one, and the third has left a process running.
    @pytest.mark.parametrize(
        "body",
        [
            "",
            "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)",
            "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        ],
    )
    def test_one_that_hangs_is_cut_and_says_how_far_it_came(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
    ) -> None:
        monkeypatch.setattr(schedule, "GRACE_SECONDS", 0.5)
        monkeypatch.setattr(schedule, "KILL_SECONDS", 0.5)
        note = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu_check.progress import Progress
progress = Progress(Path({str(tmp_path / "progress.jsonl")!r}))
progress.note("fake", planned=["a", "b", "c"])
progress.note("fake", begun="a", left=3.0)
progress.note("fake", done="a", wrong="")
progress.note("fake", begun="b", left=2.0)
"""
        begin = time.monotonic()
        outcome = self.run(tmp_path, monkeypatch, note + body + "\ntime.sleep(60)", seconds=2.0)
        assert (outcome.result, outcome.note) == ("cut", "1 of 3 steps, then in b")
        assert time.monotonic() - begin < 30

    @pytest.mark.parametrize(
        ("raised", "status", "line"),
        [
            (NotAvailable("no tool"), NOT_AVAILABLE, "not available: no tool"),
            (Cut("1 of 2 steps"), CUT, "cut: 1 of 2 steps"),
            (AssertionError("1 wrong"), FAILED, "failed: 1 wrong"),
            (None, PASSED, "all well"),
        ],
    )
    def test_ends_with_its_status(
        self, capsys: pytest.CaptureFixture[str], raised: Exception | None, status: int, line: str
    ) -> None:
        def part(options: Options) -> str:
            """Return a part."""
            if raised:
                raise raised
            return "all well"

        assert common.run_part(part, ["--device", "cpu"]) == status
        assert capsys.readouterr().out.splitlines()[-1] == line


class TestCheck:
    """All parts, with what runs one replaced."""

    @pytest.fixture(autouse=True)
    def folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "WORK", tmp_path)
        monkeypatch.setattr(runner, "run_key", lambda root, words: "a run")
        monkeypatch.setenv("OUT", str(tmp_path))

    @pytest.fixture
    def given(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
        """The seconds that each part was given, turn by turn. Parts end as `results` says, or pass."""
        given: dict[str, list[float]] = {}

        def run_one(
            part: Part, arguments: Sequence[str], seconds: float, log: Path, progress: Progress, dry: bool
        ) -> Outcome:
            given.setdefault(part.name, []).append(seconds)
            said = self.results.get(part.name, ["passed"])
            result = said.pop(0) if len(said) > 1 else said[0]
            progress.note(part.name, planned=["a", "b"])
            for step in ("a", "b") if result in ("passed", "failed") else ("a",):
                progress.note(part.name, done=step, wrong="")
            return Outcome(part.name, result, 1.0, f"note of {part.name}")

        self.results: dict[str, list[str]] = {}
        monkeypatch.setattr(runner, "run_one", run_one)
        return given

    def call(self, *arguments: str) -> int:
        return runner.main(["--device", "cpu", *arguments])

    def table(self, tmp_path: Path) -> dict[str, str]:
        lines = (tmp_path / "summary.txt").read_text().splitlines()[1:-1]
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}

    def test_each_part_keeps_to_its_cap(self, given: dict[str, list[float]]) -> None:
        assert self.call("--minutes", "20") == PASSED
        assert list(given) == [part.name for part in PARTS]
        for part in PARTS:
            (seconds,) = given[part.name]
            assert seconds + schedule.GRACE_SECONDS + schedule.KILL_SECONDS <= part.share * 1200

    def test_a_second_call_runs_what_was_cut_or_not_reached(
        self, given: dict[str, list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.results = {"models": ["cut"], "profile": ["not available"]}
        self.call("build", "models", "profile")
        assert list(given) == ["build", "models", "profile"]
        assert len(given["models"]) == 2, "what the others left over is for the part that was cut"
        given.clear()
        self.results = {}
        self.call()
        assert "build" not in given
        assert "profile" not in given
        assert next(iter(given)) == "wrappers"
        assert len(given) == len(PARTS) - 2
        assert "goes on where the last call of the same source ended" in capsys.readouterr().out
        assert "earlier: note of build" in self.table(tmp_path)["build"]
        given.clear()
        self.call()
        assert given == {}
        assert "nothing is left to do" in capsys.readouterr().out

    def test_afresh_forgets(self, given: dict[str, list[float]]) -> None:
        self.call("build")
        self.call("build", "--afresh")
        assert len(given["build"]) == 2

    def test_another_source_begins_again(self, given: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch) -> None:
        self.call("build")
        monkeypatch.setattr(runner, "run_key", lambda root, words: "another run")
        self.call("build")
        assert len(given["build"]) == 2

    def test_parts_without_time_are_not_reached(self, given: dict[str, list[float]], tmp_path: Path) -> None:
        assert self.call("--minutes", "0.3") == PASSED
        assert "models" not in given
        assert self.table(tmp_path)["models"].startswith("not reached")

    def test_fails_with_one_part(self, given: dict[str, list[float]]) -> None:
        self.results = {"parity": ["failed"]}
        assert self.call("build", "parity") == FAILED
        self.results = {}
        assert self.call("build") == PASSED
        assert self.call("build", "parity") == FAILED, "a failure of an earlier call stays one"

    def test_an_interrupt_leaves_the_summary(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def run_one(part: Part, *others: object) -> Outcome:
            if part.name == "ops":
                Progress(tmp_path / "progress.jsonl").note("ops", planned=["a", "b"])
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            return Outcome(part.name, "passed", 1.0, "")

        monkeypatch.setattr(runner, "run_one", run_one)
        assert self.call("models", "ops", "parity") == runner.INTERRUPTED
        table = self.table(tmp_path)
        assert table["models"].startswith("passed")
        assert re.match(r"cut +0 of 2 steps, next a", table["ops"])
        assert table["parity"].startswith("not reached")
        assert "1 passed, 0 failed, 0 not available, 1 cut, 1 not reached" in capsys.readouterr().out

    def test_minutes_are_more_than_none(self) -> None:
        with pytest.raises(SystemExit):
            self.call("--minutes", "0")

    def test_summary_never_counts_not_available_as_passed(self) -> None:
        outcomes = [Outcome("parity", "passed", 61.2, "12 passed"), Outcome("profile", "not available", 0.4, "no ncu")]
        lines = runner.summary(outcomes).splitlines()
        assert lines[0].split() == ["part", "result", "seconds", "note"]
        assert lines[1].split(maxsplit=3) == ["parity", "passed", "61", "12 passed"]
        assert lines[-1] == "1 passed, 0 failed, 1 not available"


def test_a_real_check_that_is_interrupted_ends_its_part(tmp_path: Path) -> None:
    environment = {**common.environment(), "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--smoke", "training"]
    command += ["--progress", str(tmp_path / "progress.jsonl")]
    check = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert check.stdout is not None
    line = next(line for line in check.stdout if line.startswith("== training"))
    assert "training steps of B0 and B4" in line
    check.send_signal(signal.SIGTERM)
    rest = check.stdout.read()
    assert check.wait(60) == runner.INTERRUPTED
    assert "1 cut" in rest
    assert (tmp_path / "summary.txt").read_text().splitlines()[1].startswith("training  cut")


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

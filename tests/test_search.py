"""The search for alpha, beta, gamma: what is tried, what is ranked, and that nothing finished is done twice."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import search_evaluations as evaluations
from hypothesis import given
from hypothesis import strategies as st
from search_evaluations import TINY

from effkernels.cli import main
from effkernels.scaling import (
    MOBILENET_V2,
    CompoundScaling,
    Rounding,
    load_network,
    scale,
    search,
)
from effkernels.scaling.candidates import Candidate, by_shares, identity, on_grid
from effkernels.scaling.digits import DIGITS_NETWORK, DIGITS_ROUNDING, DigitsEvaluation, digits
from effkernels.scaling.journal import Journal, JournalError
from effkernels.scaling.runner import name_of

COARSE = {"grid": 0.25, "tolerance": 0.15, "rounding": DIGITS_ROUNDING}
QUICK = ("--grid", "0.25", "--tolerance", "0.15", "--workers", "1")


class TestCandidates:
    @pytest.mark.parametrize(
        ("constraint", "grid", "tolerance"), [(2.0, 0.1, 0.05), (2.0, 0.2, 0.1), (1.5, 0.05, 0.03)]
    )
    def test_the_grid_has_every_point_under_the_constraint(
        self, constraint: float, grid: float, tolerance: float
    ) -> None:
        values = [1 + number * grid for number in range(math.ceil(constraint / grid))]
        points = [(a, b, g) for a in values for b in values for g in values]
        off = {p: abs(p[0] * (p[1] * p[2]) ** 2 / constraint - 1) for p in points}
        found = {(s.alpha, s.beta, s.gamma) for s in on_grid(constraint, grid=grid, tolerance=tolerance)}
        found = {tuple(round(value, 6) for value in point) for point in found}
        assert len(found) > 2
        inside = {p for p in points if off[p] < tolerance - 1e-6}
        assert {tuple(round(value, 6) for value in p) for p in inside} <= found
        outside = {p for p in points if off[p] > tolerance + 1e-6}
        assert not {tuple(round(value, 6) for value in p) for p in outside} & found

    def test_the_papers_coefficients_are_on_the_papers_grid(self) -> None:
        assert CompoundScaling(1.2, 1.1, 1.15) in on_grid(2.0, grid=0.05, tolerance=0.1)

    @given(constraint=st.floats(1.01, 8), of_depth=st.floats(0, 1), of_rest=st.floats(0, 1))
    def test_shares_meet_the_constraint(self, constraint: float, of_depth: float, of_rest: float) -> None:
        assert by_shares(constraint, of_depth, of_rest).flops(1) == pytest.approx(constraint, rel=1e-5)

    def test_what_rounds_to_one_network_is_evaluated_once(self) -> None:
        result = search(TINY, evaluations.wide_is_good, grid=0.1, tolerance=0.05, rounding=DIGITS_ROUNDING)
        networks = [identity(trial.candidate.network) for trial in result.trials]
        ways = on_grid(2.0, grid=0.1, tolerance=0.05)
        made = {identity(scale(TINY, 1, scaling=way, rounding=DIGITS_ROUNDING)) for way in ways}
        assert len(networks) == len(set(networks)) < len(ways)
        assert set(networks) == made


class TestRanking:
    def test_the_best_comes_first(self) -> None:
        result = search(TINY, evaluations.wide_is_good, **COARSE)
        betas = [trial.candidate.scaling.beta for trial in result.trials]
        assert betas == sorted(betas, reverse=True)
        assert result.best is result.trials[0]
        assert result.best.candidate.cost == result.best.candidate.network.cost()

    def test_phi_scales_the_candidates(self) -> None:
        result = search(TINY, evaluations.wide_is_good, phi=2, **COARSE)
        for trial in result.trials:
            expected = scale(TINY, 2, scaling=trial.candidate.scaling, rounding=DIGITS_ROUNDING)
            assert trial.candidate.network == expected

    def test_differences_that_chance_explains_are_called_so(self) -> None:
        result = search(TINY, evaluations.noisy, **COARSE)
        assert result.standard_error == pytest.approx(0.01 / math.sqrt(2))
        assert len(result.not_told_apart) == len(result.trials) - 1
        assert "within chance of the best" in result.table().markdown()
        assert "loss" in result.table().markdown()

    def test_without_an_evaluation_candidates_are_listed(self) -> None:
        result = search(TINY, None, **COARSE)
        flops = [trial.candidate.cost.multiply_adds for trial in result.trials]
        assert flops == sorted(flops, reverse=True)
        assert {trial.accuracy for trial in result.trials} == {None}

    def test_optuna_finds_the_widest(self) -> None:
        pytest.importorskip("optuna", reason="the extra `scaling` is not installed")
        wanted = {"sampler": "optuna", "trials": 12, "rounding": DIGITS_ROUNDING}
        result = search(TINY, evaluations.wide_is_good, **wanted)
        assert len(result.trials) == len({identity(t.candidate.network) for t in result.trials}) == 12
        assert result.best is not None
        assert result.best.candidate.scaling.beta == max(t.candidate.scaling.beta for t in result.trials) > 1.25
        again = search(TINY, evaluations.wide_is_good, **wanted)
        assert [t.candidate.key for t in again.trials] == [t.candidate.key for t in result.trials]

    def test_optuna_goes_on_from_a_journal(self, tmp_path: Path) -> None:
        pytest.importorskip("optuna", reason="the extra `scaling` is not installed")
        wanted = {"sampler": "optuna", "rounding": DIGITS_ROUNDING, "journal": tmp_path / "journal"}
        first = search(TINY, evaluations.wide_is_good, trials=5, **wanted)
        second = search(TINY, evaluations.wide_is_good, trials=9, workers=2, **wanted)
        kept = {trial.candidate for trial in second.trials if trial.is_from_journal}
        assert kept == {trial.candidate for trial in first.trials}
        assert len(second.trials) == len({identity(trial.network) for trial in second.trials}) == 9

    def test_the_plot_is_a_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="the extra `scaling` is not installed")
        search(TINY, evaluations.noisy, **COARSE).plot(tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


class TestFailures:
    def test_a_candidate_that_fails_is_recorded(self, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        result = search(TINY, evaluations.deep_fails, journal=journal, **COARSE)
        failed = [trial for trial in result.trials if trial.error]
        assert {t.candidate.scaling.alpha > 1.3 for t in failed} == {True}
        assert {t.candidate.scaling.alpha > 1.3 for t in result.trials if not t.error} == {False}
        assert all("RuntimeError: out of memory, or so" in str(trial.error) for trial in failed)
        assert result.trials[-len(failed) :] == tuple(failed)
        assert failed[0].error in {json.loads(line).get("error") for line in journal.read_text().splitlines()}
        known = search(TINY, evaluations.deep_fails, journal=journal, **COARSE)
        assert all(trial.is_from_journal for trial in known.trials)
        again = search(TINY, evaluations.deep_fails, journal=journal, retry_failed=True, **COARSE)
        assert {t.candidate.key for t in again.trials if not t.is_from_journal} == {t.candidate.key for t in failed}

    def test_an_accuracy_that_is_no_number_is_a_failure(self) -> None:
        result = search(TINY, evaluations.not_a_number, **COARSE)
        assert result.best is None
        assert all("finite" in str(trial.error) for trial in result.trials)

    def test_a_worker_that_dies_fails_only_its_candidate(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SEARCH_LOG", str(tmp_path / "log"))
        result = search(TINY, evaluations.deep_dies, workers=2, **COARSE)
        dead = [trial for trial in result.trials if trial.error]
        assert [t.candidate.scaling.alpha for t in dead] == [2.25]
        assert "its process died" in str(dead[0].error)
        others = [trial.candidate.key for trial in result.trials if not trial.error]
        assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(others)  # none is evaluated twice

    def test_what_cannot_be_sent_to_a_worker_is_a_failure(self) -> None:
        result = search(TINY, lambda candidate: 0.5, workers=2, **COARSE)
        assert result.best is None
        assert all("pickle" in str(trial.error) for trial in result.trials)


class TestWorkers:
    def test_serve_the_whole_search(self) -> None:
        pytest.importorskip("optuna", reason="the extra `scaling` is not installed")
        wanted = {"sampler": "optuna", "trials": 6, "workers": 2, "rounding": DIGITS_ROUNDING}
        result = search(TINY, evaluations.of_its_process, **wanted)
        processes = {trial.values["process"] for trial in result.trials}
        assert len(processes) == 2
        assert os.getpid() not in processes

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_end_with_the_search(self, number: signal.Signals, tmp_path: Path) -> None:
        log = tmp_path / "log"
        code = (
            "from effkernels.scaling import search; import search_evaluations as e, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
            "search(e.TINY, e.endless, workers=2)"
        )
        environment = os.environ | {"SEARCH_LOG": str(log)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 100
        while not (log.exists() and len(log.read_text().splitlines()) == 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)  # to the search alone; a terminal would send Ctrl-C to its workers, too
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == -number
        assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
        workers = [int(line) for line in log.read_text().splitlines()]
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)


class TestJournal:
    def test_workers_and_a_journal_give_the_same_as_neither(self, tmp_path: Path) -> None:
        alone = search(TINY, evaluations.wide_is_good, **COARSE)
        journal = tmp_path / "made" / "journal.jsonl"
        together = search(TINY, evaluations.wide_is_good, workers=2, journal=journal, **COARSE)
        assert [(t.candidate, t.accuracy) for t in together.trials] == [(t.candidate, t.accuracy) for t in alone.trials]

    def test_a_killed_search_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log, journal = tmp_path / "log", tmp_path / "journal.jsonl"
        monkeypatch.setenv("SEARCH_LOG", str(log))
        code = (
            "from effkernels.scaling import search; import search_evaluations as e\n"
            "from effkernels.scaling.digits import DIGITS_ROUNDING\n"
            f"search(e.TINY, e.slow, journal={str(journal)!r}, grid=0.25, tolerance=0.15, "
            "rounding=DIGITS_ROUNDING)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
        deadline = time.monotonic() + 100
        while not (log.exists() and len(log.read_text().splitlines()) >= 4):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = journal.read_text().splitlines()[1:]
        with journal.open("a") as file:
            file.write('{"kind": "trial", "key": "torn')  # as a kill within the write would leave it
        result = search(TINY, evaluations.slow, journal=journal, **COARSE)
        calls = Counter(log.read_text().split("\n")[:-1])
        assert 3 <= len(done) < len(result.trials)
        assert set(calls) == {trial.candidate.key for trial in result.trials}
        finished = {json.loads(line)["key"] for line in done}
        assert {trial.candidate.key for trial in result.trials if trial.is_from_journal} == finished
        assert all(calls[key] == 1 for key in finished)
        assert sum(calls.values()) <= len(result.trials) + 1  # the one that was under way
        with_nothing_to_do = search(TINY, evaluations.slow, journal=journal, **COARSE)
        assert all(trial.is_from_journal for trial in with_nothing_to_do.trials)

    @pytest.mark.parametrize(
        ("changed", "difference"),
        [
            ({"constraint": 3.0}, "constraint is 2.0 there and 3.0 here"),
            ({"grid": 0.5}, "grid is 0.25 there and 0.5 here"),
            ({"num_classes": 10}, "num_classes is 1000 there and 10 here"),
            ({"rounding": Rounding()}, "rounding is"),
        ],
    )
    def test_that_of_another_search_is_refused(
        self, tmp_path: Path, changed: dict[str, object], difference: str
    ) -> None:
        journal = tmp_path / "journal.jsonl"
        search(TINY, evaluations.wide_is_good, journal=journal, **COARSE)
        before = journal.read_bytes()
        with pytest.raises(JournalError, match=difference):
            search(TINY, evaluations.wide_is_good, journal=journal, **{**COARSE, **changed})
        with pytest.raises(JournalError, match="evaluate is 'search_evaluations:wide_is_good' there"):
            search(TINY, evaluations.noisy, journal=journal, **COARSE)
        with pytest.raises(JournalError, match="baseline is 'tiny"):
            search(MOBILENET_V2, evaluations.wide_is_good, journal=journal, **COARSE)
        assert journal.read_bytes() == before

    def test_a_file_of_something_else_is_not_changed(self, tmp_path: Path) -> None:
        for content in ("precious\n", '{"no": "journal"}\n', "without an end"):
            file = tmp_path / "file"
            file.write_text(content)
            with pytest.raises(JournalError, match="file"):
                Journal(file, {})
            assert file.read_text() == content

    def test_two_searches_cannot_write_to_one(self, tmp_path: Path) -> None:
        with Journal(tmp_path / "journal", {"a": 1}), pytest.raises(JournalError, match="another search is writing"):
            Journal(tmp_path / "journal", {"a": 1})
        with Journal(tmp_path / "journal", {"a": 1}) as again:
            assert again.get("trial", "x") is None

    def test_evaluations_are_told_apart(self) -> None:
        assert name_of(DigitsEvaluation(seeds=2)) != name_of(DigitsEvaluation(seeds=3))
        assert name_of(evaluations.slow) == "search_evaluations:slow"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"constraint": 1.0}, "constraint=1.0; allowed: above 1"),
        ({"constraint": "memory"}, "'latency'"),
        ({"constraint": "latency"}, "budget_ms belong together"),
        ({"budget_ms": 3.0}, "budget_ms belong together"),
        ({"sampler": "random"}, "sampler='random'; allowed: grid, optuna"),
        ({"grid": 0.0}, "grid=0"),
        ({"grid": 0.3, "tolerance": 0.0}, "finer grid"),
        ({"workers": 0}, "workers=0; allowed: 1 or more"),
        ({"backend": "threads"}, "backend='threads'; allowed: processes, ray"),
        ({"phi": 0.0}, "phi=0"),
        ({"trials": 0}, "trials=0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(TINY, evaluations.wide_is_good, **arguments)  # type: ignore[arg-type]


class TestDigits:
    def test_the_split_holds_out(self) -> None:
        pytest.importorskip("sklearn", reason="the extra `scaling` is not installed")
        data = digits(600)
        assert (len(data.train_images), len(data.test_images)) == (600, 1197)
        assert data.train_images.shape[1:] == (1, 8, 8)
        assert float(data.train_images.min()) == -1
        assert float(data.train_images.max()) == 1
        assert data.train_labels.bincount().min() >= 55
        train = {image.numpy().tobytes() for image in data.train_images}
        assert not train & {image.numpy().tobytes() for image in data.test_images}

    def test_another_number_of_classes_is_refused(self) -> None:
        candidate = Candidate("x", DIGITS_NETWORK, CompoundScaling(1, 1, 1), 0, DIGITS_NETWORK.cost(), 1000, 1)
        with pytest.raises(ValueError, match="allowed: 10 and 1"):
            DigitsEvaluation()(candidate)

    @pytest.mark.slow
    def test_two_candidates_learn_the_same_every_time(self) -> None:
        pytest.importorskip("sklearn", reason="the extra `scaling` is not installed")
        wanted = {"constraint": 2.25, "grid": 0.5, "tolerance": 0.05, "rounding": DIGITS_ROUNDING}
        evaluate = DigitsEvaluation(seeds=1, epochs=6)
        first, second = (
            search(DIGITS_NETWORK, evaluate, num_classes=10, in_chans=1, threads=1, **wanted) for _ in range(2)
        )
        assert [t.values for t in first.trials] == [t.values for t in second.trials]
        assert [t.candidate.key for t in first.trials] == [t.candidate.key for t in second.trials]
        assert len(first.trials) == 2
        assert all(trial.accuracy is not None and trial.accuracy > 0.5 for trial in first.trials)


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["search", *arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    def test_table_on_stdout_progress_on_stderr(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        status, out, err = self.run(
            capsys, "--network", "search_evaluations:TINY", "--evaluate", "search_evaluations:wide_is_good",
            *QUICK, "--divisor", "2", "--save", str(tmp_path / "best.json"), "--plot", str(tmp_path / "plot.png"),
        )  # fmt: skip
        assert status == 0
        assert out.startswith("tiny: coefficients of compound scaling")
        assert "accuracy" in out
        assert "alpha=" not in out
        assert "accuracy" in err
        assert load_network(tmp_path / "best.json").resolution >= 8
        assert (tmp_path / "plot.png").stat().st_size > 1000

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = self.run(
            capsys, "--network", "search_evaluations:TINY", "--evaluate", "none", *QUICK, "--json", "--constraint", "3"
        )
        report = json.loads(out)
        assert status == 0
        assert report["constraint"] == 3.0
        assert report["trials"][0]["key"] == report["best"]
        assert report["best_network"]["name"].startswith("tiny")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--network", "nothing"), "network 'nothing' is not known"),
            (("--evaluate", "search_evaluations:nothing"), "has no attribute 'nothing'"),
            (("--evaluate", "search_evaluations:slow", "--data", "digits"), "one of them"),
            (("--evaluate", "search_evaluations:slow", "--seeds", "2"), "not for your own"),
            (("--constraint", "latency"), "budget_ms belong together"),
            (("--what", "baseline", "--evaluate", "none"), "found by its accuracy"),
            (("--constraint", "soon"), "neither a number nor latency"),
        ],
    )
    def test_wrong_arguments(
        self, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
    ) -> None:
        status, out, err = self.run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err


@pytest.mark.slow
@pytest.mark.thorough  # a cluster of Ray; it gets the same function as the workers, above
def test_tasks_of_ray_give_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    alone = search(TINY, evaluations.wide_is_good, **COARSE)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    code = (
        "from effkernels.scaling import search; import search_evaluations as e, json\n"
        "from effkernels.scaling.digits import DIGITS_ROUNDING\n"
        "r = search(e.TINY, e.wide_is_good, backend='ray', workers=2, threads=1, grid=0.25, tolerance=0.15, "
        "rounding=DIGITS_ROUNDING)\n"
        "print(json.dumps([[t.candidate.key, t.accuracy] for t in r.trials]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[t.candidate.key, t.accuracy] for t in alone.trials]

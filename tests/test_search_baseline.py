"""The search for a baseline: the space, the reward, and a journal from which it continues where it was killed."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import search_evaluations as evaluations
import torch

from effkernels.cli import main
from effkernels.scaling import (
    EFFICIENTNET_B0,
    Network,
    SearchSpace,
    load_network,
    save_network,
    scale,
    search,
    search_baseline,
)
from effkernels.scaling.baseline_search import DIGITS_SPACE, describe, reward

pytest.importorskip("optuna", reason="the extra `scaling` is not installed")

SPACE = SearchSpace(
    resolution=8,
    stem_channels=4,
    strides=(1, 2),
    channels=((4,), (4, 6)),
    layers=(1,),
    skips=(True,),
    head_channels=8,
)


class TestSpace:
    def test_the_papers_space_holds_the_papers_baseline(self) -> None:
        space = SearchSpace()
        chosen = {}
        for number, stage in enumerate(EFFICIENTNET_B0.stages[1:-1]):
            chosen |= {
                f"channels_{number}": stage.channels,
                f"layers_{number}": stage.layers,
                f"kernel_sizes_{number}": stage.kernel_size,
                f"expansions_{number}": stage.options["expansion"],
                f"se_ratios_{number}": stage.options["se_ratio"],
                f"skips_{number}": True,
            }
        found = space.network(chosen)
        assert found.cost() == EFFICIENTNET_B0.cost()
        assert found.rows() == EFFICIENTNET_B0.rows()

    @pytest.mark.parametrize("choice", range(6))
    def test_every_choice_builds_and_survives_a_file(self, choice: int, tmp_path: Path) -> None:
        chosen = {name: of[choice % len(of)] for name, of in SPACE.choices().items()}
        network = SPACE.network(chosen)
        save_network(network, tmp_path / "network.json")
        assert load_network(tmp_path / "network.json") == network
        module = network.build(num_classes=3, in_chans=1).eval()
        assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
        assert describe(network).count("x") == 2
        assert scale(network, 1).resolution > network.resolution

    def test_without_a_skip_there_is_no_residual(self) -> None:
        first = {name: of[0] for name, of in DIGITS_SPACE.choices().items()}
        for skips, residual in ((True, True), (False, False)):
            network = DIGITS_SPACE.network({**first, "skips_1": skips, "layers_1": 2})
            module = network.build(num_classes=10, in_chans=1)
            assert module.get_submodule("stages.2.1").has_skip is residual

    def test_every_network_has_its_own_description(self) -> None:
        space = SearchSpace(
            strides=(1,),
            channels=((4, 8),),
            layers=(1, 2),
            kernel_sizes=(3,),
            se_ratios=(0, 0.25, 0.5),
            expansions=(1, 2),
        )
        names, values = space.choices().keys(), itertools.product(*space.choices().values())
        found = {describe(space.network(dict(zip(names, chosen, strict=True)))) for chosen in values}
        assert len(found) == space.size == 48

    def test_what_cannot_be_chosen_is_refused(self) -> None:
        first = {name: of[0] for name, of in SPACE.choices().items()}
        with pytest.raises(ValueError, match=r"kernel_sizes_1=7; allowed: 3, 5"):
            SPACE.network({**first, "kernel_sizes_1": 7})
        with pytest.raises(ValueError, match="2 strides and channels for 1"):
            SearchSpace(strides=(1, 2), channels=((8,),))
        with pytest.raises(ValueError, match="layers_0 is empty"):
            SearchSpace(layers=())


class TestReward:
    def test_is_the_papers(self) -> None:
        assert reward(0.75, 400e6, 400e6) == 0.75
        assert reward(0.75, 800e6, 400e6) == pytest.approx(0.75 * 2**-0.07)
        with pytest.raises(ValueError, match="cost=0"):
            reward(0.5, 0, 1)

    def test_trials_are_ranked_by_it(self) -> None:
        result = search_baseline(evaluations.with_gates, space=SPACE, trials=12, target=1e5)
        rewards = [trial.reward for trial in result.trials]
        assert len(rewards) == len({trial.network for trial in result.trials}) == 12
        assert rewards == sorted(rewards, reverse=True)
        for trial in result.trials:
            counted = trial.network.cost(num_classes=10, in_chans=1)
            assert trial.cost == counted
            assert trial.reward == pytest.approx(reward(trial.values["accuracy"], counted.multiply_adds, 1e5))
        assert json.loads(json.dumps(result.to_dict()))["trials"][0]["reward"] == rewards[0]

    def test_latency_can_be_the_cost(self) -> None:
        class Parameters:
            is_measured = False
            description = "one millisecond per thousand parameters"

            def __call__(self, network: Network) -> float:
                return network.cost(num_classes=10, in_chans=1).parameters / 1e3

        result = search_baseline(evaluations.with_gates, space=SPACE, trials=5, latency=Parameters(), target=1)
        for trial in result.trials:
            assert trial.latency_ms == trial.cost.parameters / 1e3
            assert trial.reward == pytest.approx(reward(trial.values["accuracy"], trial.latency_ms, 1))
        assert "one millisecond per thousand parameters" in result.table().markdown()

    def test_a_space_that_is_used_up_ends_the_search(self) -> None:
        small = SearchSpace(8, 4, strides=(1,), channels=((4,),), layers=(1,), expansions=(1,), head_channels=8)
        lines: list[str] = []
        result = search_baseline(evaluations.with_gates, space=small, trials=30, report=lines.append)
        assert len(result.trials) == small.size == 8
        assert "nothing new after 8 networks" in lines[-1]

    def test_failures_are_recorded(self) -> None:
        result = search_baseline(evaluations.gates_fail, space=SPACE, trials=12)
        failed = [trial for trial in result.trials if trial.error]
        assert failed
        assert result.trials[-len(failed) :] == tuple(failed)
        assert all("RuntimeError: no gates, please" in str(trial.error) for trial in failed)
        assert "no gates" in result.table(None).markdown()


def kill_after(calls: int, log: Path, journal: Path) -> None:
    """Kill a slow search for ten networks after so many calls of its evaluation."""
    code = (
        "from effkernels.scaling import search_baseline; from test_search_baseline import SPACE, evaluations as e\n"
        f"search_baseline(e.slowly_with_gates, space=SPACE, trials=10, journal={str(journal)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 100
    while not (log.exists() and len(log.read_text().splitlines()) >= calls):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


class TestJournal:
    def test_goes_on_after_a_kill(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log, journal = tmp_path / "log", tmp_path / "journal.jsonl"
        monkeypatch.setenv("SEARCH_LOG", str(log))
        kill_after(4, log, journal)
        before = len(log.read_text().splitlines())
        lines: list[str] = []
        wanted = {"space": SPACE, "journal": journal, "report": lines.append}
        result = search_baseline(evaluations.slowly_with_gates, trials=10, **wanted)
        assert len(result.trials) == 10
        assert lines[0] in (f"{n} of {n} are in the journal" for n in (before - 1, before))
        calls = Counter(log.read_text().split("\n")[:-1])
        assert sum(calls.values()) <= 11  # the one that was under way
        more = search_baseline(evaluations.slowly_with_gates, trials=11, **wanted)
        assert {(t.number, t.network) for t in result.trials} < {(t.number, t.network) for t in more.trials}
        assert more.target == result.target

    def test_goes_on_with_another_seed_and_more_workers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log, journal = tmp_path / "log", tmp_path / "journal.jsonl"
        monkeypatch.setenv("SEARCH_LOG", str(log))
        wanted = {"space": SPACE, "journal": journal}
        first = search_baseline(evaluations.with_gates, trials=4, **wanted)
        second = search_baseline(evaluations.with_gates, trials=7, seed=5, workers=2, **wanted)
        kept = {(t.number, t.network, t.reward) for t in second.trials if t.is_from_journal}
        assert kept == {(t.number, t.network, t.reward) for t in first.trials}
        assert len(second.trials) == len(log.read_text().splitlines()) == 7
        fewer = search_baseline(evaluations.with_gates, trials=2, **wanted)
        assert [t.network for t in fewer.trials] == [t.network for t in second.trials]

    def test_failures_are_tried_again_on_demand(self, tmp_path: Path) -> None:
        wanted = {"space": SPACE, "trials": 12, "journal": tmp_path / "journal"}
        failed = {t.network for t in search_baseline(evaluations.gates_fail, **wanted).trials if t.error}
        again = search_baseline(evaluations.gates_fail, retry_failed=True, **wanted)
        assert failed
        assert {t.network for t in again.trials if not t.is_from_journal} == failed

    def test_a_line_that_a_kill_tore_is_dropped_and_no_later_one_is_lost(self, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        search_baseline(evaluations.with_gates, space=SPACE, trials=2, journal=journal)
        whole = journal.read_bytes()
        with journal.open("ab") as file:
            file.write(b'{"kind": "trial", "key": "torn')
        for trials in (3, 4):
            found = search_baseline(evaluations.with_gates, space=SPACE, trials=trials, journal=journal)
            assert len(found.trials) == trials
        assert journal.read_bytes().startswith(whole)
        assert [json.loads(line).get("kind") for line in journal.read_text().splitlines()] == [None, *["trial"] * 4]

    def test_the_lock_of_a_search_that_was_killed_is_not_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log, journal = tmp_path / "log", tmp_path / "journal.jsonl"
        monkeypatch.setenv("SEARCH_LOG", str(log))
        kill_after(1, log, journal)
        start = time.monotonic()
        search_baseline(evaluations.slowly_with_gates, space=SPACE, trials=2, journal=journal)
        assert time.monotonic() - start < 25

    def test_a_second_search_on_a_journal_is_refused_and_harms_nothing(self, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        tried = []

        def second(line: str) -> None:
            with pytest.raises(ValueError, match=r"journal\.jsonl: another search is writing to it"):
                search_baseline(evaluations.with_gates, space=SPACE, trials=9, journal=journal)
            tried.append(line)

        found = search_baseline(evaluations.with_gates, space=SPACE, trials=2, journal=journal, report=second)
        assert len(tried) >= 2
        assert len(found.trials) == 2

    def test_a_line_in_the_middle_that_is_none_is_named(self, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        search_baseline(evaluations.with_gates, space=SPACE, trials=2, journal=journal)
        lines = journal.read_text().splitlines(keepends=True)
        journal.write_text("".join([*lines[:2], "[" * 100_000 + "\n", *lines[2:]]))
        before = journal.read_bytes()
        with pytest.raises(ValueError, match=r"journal\.jsonl:3: not a record of a search"):
            search_baseline(evaluations.with_gates, space=SPACE, trials=2, journal=journal)
        assert journal.read_bytes() == before

    def test_that_of_another_search_is_refused(self, tmp_path: Path) -> None:
        journal = tmp_path / "journal.jsonl"
        search_baseline(evaluations.with_gates, space=SPACE, trials=1, journal=journal)
        before = journal.read_bytes()
        with pytest.raises(ValueError, match=r"weight is -0\.07 there and -0\.1 here"):
            search_baseline(evaluations.with_gates, space=SPACE, trials=1, journal=journal, weight=-0.1)
        with pytest.raises(ValueError, match="evaluate is 'search_evaluations:with_gates' there"):
            search_baseline(evaluations.gates_fail, space=SPACE, trials=1, journal=journal)
        with pytest.raises(ValueError, match="search is 'baseline' there and 'coefficients' here"):
            search(evaluations.TINY, evaluations.with_gates, journal=journal)
        assert journal.read_bytes() == before

    @pytest.mark.parametrize("content", ["precious\n", '{"op_code": 0, "study_name": "of Optuna"}\n'])
    def test_a_file_of_something_else_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "file").write_text(content)
        with pytest.raises(ValueError, match=r"file(:1)?: not a"):
            search_baseline(evaluations.with_gates, space=SPACE, trials=1, journal=tmp_path / "file")
        assert (tmp_path / "file").read_text() == content

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"trials": 0}, "trials=0"), ({"weight": 0.1}, "weight=0.1; allowed: at most 0"), ({"target": -1}, "target")],
    )
    def test_what_makes_no_sense_is_refused(self, arguments: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            search_baseline(evaluations.with_gates, space=SPACE, **arguments)  # type: ignore[arg-type]


def test_the_command_saves_a_network_that_can_be_scaled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    status = main(
        ["search", "--what", "baseline", "--evaluate", "search_evaluations:with_gates", "--trials", "3", "--in-chans",
         "1", "--workers", "1", "--save", str(found), "--plot", str(tmp_path / "plot.png"), "--json"]
    )  # fmt: skip
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert status == 0
    assert "3/3" in output.err
    assert len(report["trials"]) == 3
    network = load_network(found)
    assert describe(network) == report["trials"][0]["stages"]
    assert (tmp_path / "plot.png").stat().st_size > 1000

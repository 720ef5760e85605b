"""The suites: which cases there are, what a filter and an earlier file leave of them, and what an interrupt keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run, run_json

from effkernels.bench import suites, timing, train_cases
from effkernels.bench.block_cases import blocks_of, measure_block
from effkernels.bench.measure import Options, Refusal
from effkernels.bench.network_case import NetworkCase
from effkernels.bench.networks import Interrupted, case_name, network_case
from effkernels.bench.op_calls import calls_of
from effkernels.bench.op_cases import measure_op
from effkernels.bench.suites import SUITES, Settings
from effkernels.bench.timing import Row, read_rows
from effkernels.bench.train_cases import measure_training

CPU = torch.device("cpu")
FOREIGN = "timm:mobilenetv3_small_050"
QUICK = Options(warmup=1, rounds=2, memory=False, calibrate=False)
SETTINGS = Settings(("efficientnet_b0",), (1,), ("float32",), CPU, 1, QUICK, img_size=32)

Measured = tuple[list[Row], list[Refusal]]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Networks are not run: each contender takes 5 us. The titles of the cases in the order in which they came."""
    seen: list[str] = []

    def fake(case: NetworkCase, names: Sequence[str], options: Options, *, suite: str, date: str, **_: Any) -> Measured:
        seen.append(f"{suite} {case_name(case)} {case.numbers.name} {case.batch}")
        rows = [
            timing.make_row(
                timing.summarise([5.0]), suite=suite, case=case_name(case), contender=name, batch=case.batch,
                device=suites.environment.device_name(CPU, case.threads), dtype=case.numbers.name, date=date,
                rel_error=1e-7,
            )
            for name in names
        ]  # fmt: skip
        return [dataclasses.replace(row, name=row.contender) for row in rows], []

    monkeypatch.setattr(suites, "run_case", fake)
    return seen


class TestCases:
    def test_every_model_precision_and_batch(self) -> None:
        settings = dataclasses.replace(
            SETTINGS, models=("efficientnet_b0", FOREIGN), batches=(1, 4), precisions=("float32", "bfloat16")
        )
        found = [(case.case, case.dtype, case.batch) for case in SUITES["model"](settings)]
        assert found == [
            (f"{model}@32", dtype, batch)
            for model in settings.models
            for dtype in ("float32", "bfloat16")
            for batch in (1, 4)
        ]

    def test_contenders_by_default(self) -> None:
        settings = dataclasses.replace(SETTINGS, models=("efficientnet_b0", FOREIGN))
        own, foreign = SUITES["model"](settings)
        assert own.contenders == ("effkernels", "eager", "eager-channels-last", "compile")
        assert foreign.contenders == ("optimized", "eager", "eager-channels-last", "compile")

    def test_latency_is_of_one_image_that_is_waited_for(self) -> None:
        (case,) = SUITES["latency"](dataclasses.replace(SETTINGS, batches=(16,)))
        assert case.batch == 1
        assert case.options.waited
        assert "engine" in case.contenders

    def test_operators_are_those_of_the_model(self) -> None:
        settings = dataclasses.replace(SETTINGS, models=("efficientnet_b0", FOREIGN), batches=(2,))
        cases = [case.case for case in SUITES["op"](settings)]
        calls = [call for model in settings.models for call in calls_of(model, 32)]
        assert cases == [str(call.with_(batch=2)) for call in dict.fromkeys(calls)]
        assert any(" 2x8x" in case for case in cases)

    def test_autocast_has_no_operators(self) -> None:
        with pytest.raises(ValueError, match="--precision amp: autocast is for networks; the suite op takes dtypes"):
            list(SUITES["op"](dataclasses.replace(SETTINGS, precisions=("amp",))))

    def test_filter(self) -> None:
        (case,) = SUITES["model"](SETTINGS)
        assert case.title == "model efficientnet_b0@32, float32, batch 1"
        for patterns, kept in ((["b0@32"], True), (["b1", "float32"], True), (["model *1"], True), (["b1"], False)):
            assert case.matches(patterns) == kept


class TestMeasuring:
    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", ["efficientnet_b0", FOREIGN])
    def test_blocks(self, model: str) -> None:
        blocks = blocks_of(model, 32)
        assert len({(block.shape, block.out) for block in blocks}) > 4
        block = blocks[1]
        rows, refusals = measure_block(
            block, 3, torch.float32, ["effkernels", "eager"], CPU, QUICK, threads=1, date="now"
        )
        assert refusals == []
        assert [(row.name, row.suite, row.case) for row in rows] == [
            (name, "block", block.case(3)) for name in ("effkernels", "eager")
        ]
        assert all(row.rel_error is not None and 0 < row.rel_error < 1e-5 for row in rows)

    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", ["efficientnet_b0", FOREIGN])
    def test_training_steps(self, model: str) -> None:
        names = ("effkernels", "optimized", "eager", "eager-channels-last")
        case = network_case(model, 2, img_size=96)
        rows, refusals = measure_training(case, names, QUICK, threads=1, date="now")
        own = model == "efficientnet_b0"
        assert [row.name for row in rows] == list(names if own else names[1:])
        assert [refusal.contender for refusal in refusals] == ([] if own else ["effkernels"])
        assert all(row.suite == "train" and row.rounds == 2 for row in rows)
        assert all(row.rel_error is not None and 0 < row.rel_error < 1e-2 for row in rows)

    @pytest.mark.usefixtures("compiled")
    def test_wrong_gradients_are_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(model: torch.nn.Module, **_: Any) -> None:
            next(model.parameters()).register_hook(lambda gradient: 2.0 * gradient)

        monkeypatch.setattr(train_cases.effkernels, "optimize_", wrong)
        case = network_case("efficientnet_b0", 2, img_size=96)
        rows, refusals = measure_training(case, ["optimized", "eager"], QUICK, threads=1, date="now")
        assert [row.name for row in rows] == ["eager"]
        assert refusals[0].reason.startswith("wrong: gradients off by")

    @pytest.mark.usefixtures("compiled")
    def test_operators(self) -> None:
        call = calls_of("efficientnet_b0", 32)[1]
        rows, refusals = measure_op(call, torch.bfloat16, ["effkernels", "eager"], CPU, QUICK, threads=1, date="now")
        assert refusals == []
        assert [row.contender for row in rows] == ["effkernels-cpu", "eager"]
        assert [row.name for row in rows] == ["effkernels", "eager"]
        assert all(row.bytes == call.bytes_moved(torch.bfloat16) and row.rounds == 2 for row in rows)

    @pytest.mark.usefixtures("compiled")
    def test_overhead(self) -> None:
        (case,) = SUITES["overhead"](SETTINGS)
        rows, refusals = case.measure(QUICK, date="now", advance=lambda name: None, report=lambda line: None)
        assert refusals == []
        assert tuple(row.name for row in rows) == case.contenders
        assert all(row.suite == "overhead" and row.median_us > 0 and row.batch == 1 for row in rows)

    def test_a_wrong_operator_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from effkernels.bench import op_cases

        class Wrong:
            def __init__(self, op: str) -> None:
                right = getattr(op_cases.reference, op)
                setattr(self, op, lambda *args, **kwargs: tuple(1.01 * y for y in right(*args, **kwargs)))

        monkeypatch.setattr(op_cases, "_Compiled", Wrong)
        call = calls_of("efficientnet_b0", 32)[1]
        rows, refusals = measure_op(call, torch.float32, ["eager", "compile"], CPU, QUICK, threads=1, date="now")
        assert [row.name for row in rows] == ["eager"]
        assert refusals[0].reason.startswith("wrong: off by 1.0e-02 from float64")


class TestCommand:
    flags = ("--img-size", "32", "--device", "cpu", "--threads", "1", "--contender", "eager", "timm", "--model",
             "efficientnet_b0", "efficientnet_b1")  # fmt: skip

    def test_list(self, capsys: pytest.CaptureFixture[str], measured: list[str]) -> None:
        status, out, _ = run(capsys, "bench", "--list", *self.flags, "--precision", "float32", "bfloat16")
        assert status == 0
        assert out.splitlines() == [
            f"model efficientnet_{model}@32, {dtype}, batch 1: eager, timm"
            for model in ("b0", "b1")
            for dtype in ("float32", "bfloat16")
        ]
        _, report = run_json(capsys, "bench", "--list", *self.flags, "--filter", "b1")
        assert [case["case"] for case in report] == ["efficientnet_b1@32"]
        assert measured == []

    def test_a_filter_that_leaves_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, err = run(capsys, "bench", *self.flags, "--filter", "b7")
        assert status == 2
        assert "--filter b7: none of 2 cases; --list shows them" in err

    def test_quick(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Options] = []

        def fake(case: NetworkCase, names: Sequence[str], options: Options, **more: object) -> Measured:
            seen.append(options)
            return [], []

        monkeypatch.setattr(suites, "run_case", fake)
        for more in ((), ("--quick",), ("--quick", "--rounds", "7")):
            run(capsys, "bench", *self.flags, "--filter", "b0", *more)
        assert [(options.warmup, options.rounds, options.memory) for options in seen] == [
            (3, 20, True), (1, 5, False), (1, 7, False),
        ]  # fmt: skip

    def test_resume_measures_what_is_missing(
        self, capsys: pytest.CaptureFixture[str], measured: list[str], tmp_path: Path
    ) -> None:
        file = tmp_path / "rows.jsonl"
        assert run(capsys, "bench", *self.flags, "--filter", "b0", "--resume", file)[0] == 0
        first = read_rows(file)
        status, out, err = run(capsys, "bench", *self.flags, "--resume", file)
        assert status == 0
        assert f"bench: 1 of 2 cases are in {file} already" in err
        assert measured == ["model efficientnet_b0@32 float32 1", "model efficientnet_b1@32 float32 1"]
        assert read_rows(file)[: len(first)] == first
        assert out.count("efficientnet_b0@32, batch 1") == out.count("efficientnet_b1@32, batch 1") == 1

    @pytest.mark.parametrize(
        "changes", [{"commit": "0" * 40}, {"device": "another"}, {"name": None}, {"versions": {"torch": "1.0"}}]
    )
    def test_rows_of_something_else_do_not_count(
        self, capsys: pytest.CaptureFixture[str], measured: list[str], tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        file = tmp_path / "rows.jsonl"
        run(capsys, "bench", *self.flags, "--filter", "b0", "--resume", file)
        rows = [dataclasses.replace(row, **changes) for row in read_rows(file)]
        file.write_text("".join(row.to_json() + "\n" for row in rows))
        run(capsys, "bench", *self.flags, "--filter", "b0", "--resume", file)
        assert len(measured) == 2

    def test_another_contender_needs_the_case_again(
        self, capsys: pytest.CaptureFixture[str], measured: list[str], tmp_path: Path
    ) -> None:
        file, flags = tmp_path / "rows.jsonl", self.flags[:6]
        for names in (("eager",), ("eager", "eager-channels-last"), ("eager",)):
            run(capsys, "bench", *flags, "--contender", *names, "--resume", file)
        assert len(measured) == 2

    def test_one_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        arguments = ("--resume", tmp_path / "a", "--results-file", tmp_path / "b")
        status, _, err = run(capsys, "bench", *self.flags, *arguments)
        assert status == 2
        assert "allowed: one file" in err
        (tmp_path / "a").write_text("no row\n")
        status, _, err = run(capsys, "bench", *self.flags, "--resume", tmp_path / "a")
        assert status == 2
        assert "a:1: not a result row" in err

    def test_ctrl_c_keeps_the_cases_before_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, measured: list[str], tmp_path: Path
    ) -> None:
        whole: Callable[..., Measured] = suites.run_case
        file = tmp_path / "rows.jsonl"

        def interrupted(case: NetworkCase, *arguments: Any, **options: Any) -> Measured:
            if case.model == "efficientnet_b1":
                raise KeyboardInterrupt
            return whole(case, *arguments, **options)

        monkeypatch.setattr(suites, "run_case", interrupted)
        status, out, err = run(capsys, "bench", *self.flags, "--results-file", file)
        assert status == 130
        assert {row.case for row in read_rows(file)} == {"efficientnet_b0@32"}
        assert "efficientnet_b0@32, batch 1" in out
        assert f"bench: interrupted, 1 of 2 cases have rows; --resume {file} goes on" in err

    def test_ctrl_c_while_memory_is_measured_keeps_the_times(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, measured: list[str], tmp_path: Path
    ) -> None:
        whole: Callable[..., Measured] = suites.run_case

        def interrupted(*arguments: Any, **options: Any) -> Measured:
            raise Interrupted(*whole(*arguments, **options))

        monkeypatch.setattr(suites, "run_case", interrupted)
        status, out, _ = run(capsys, "bench", *self.flags, "--json", "--results-file", tmp_path / "rows.jsonl")
        report = json.loads(out)
        assert status == 130
        assert report["interrupted"] is True
        assert [row["case"] for row in report["rows"]] == ["efficientnet_b0@32"] * 2
        assert len(read_rows(tmp_path / "rows.jsonl")) == 2

    def test_a_case_of_a_machine_that_drifted_is_marked(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, measured: list[str]
    ) -> None:
        whole: Callable[..., Measured] = suites.run_case

        def drifted(*arguments: Any, **options: Any) -> Measured:
            rows, refusals = whole(*arguments, **options)
            machine = {"throttled": ["power cap"]}
            return [dataclasses.replace(row, spread=0.031, steady=False, machine=machine) for row in rows], refusals

        monkeypatch.setattr(suites, "run_case", drifted)
        _, out, _ = run(capsys, "bench", *self.flags, "--filter", "b0")
        assert out.count(" 3.1%* ") == 2
        assert "* The machine's own speed changed by more than 10% during this case" in out
        assert out.endswith("The GPU's clock was held back: power cap.\n")


def test_interrupt_in_memory_has_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from effkernels.bench import networks

    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "peak_memory", interrupt)
    case = NetworkCase("efficientnet_b0", 32, 1)
    with pytest.raises(Interrupted) as interrupted:
        networks.run_case(case, ["eager"], dataclasses.replace(QUICK, memory=True), date="now")
    assert [(row.name, row.peak_bytes) for row in interrupted.value.rows] == [("eager", None)]

"""The suites layer, kernelbench and paper, and the memory of training: what is timed is what its name says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from test_bench_suites import FOREIGN, QUICK, SETTINGS

from effkernels.bench import block_cases, kernelbench, layer_cases, paper_cases, timing
from effkernels.bench.block_cases import block_paths
from effkernels.bench.networks import network_case
from effkernels.bench.peak_memory import peak_memory
from effkernels.bench.suites import SUITES
from effkernels.commands import bench
from effkernels.report import measured

CPU = torch.device("cpu")


class TestLayers:
    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("model", ["efficientnet_b0", FOREIGN])
    def test_parts_are_those_of_the_network_and_add_up(self, model: str) -> None:
        case = network_case(model, 2, img_size=32)
        first = "effkernels" if model == "efficientnet_b0" else "optimized"
        rows, refusals = layer_cases.measure_layers(case, (first, "eager"), QUICK, threads=1, date="now")
        assert refusals == []
        for name in (first, "eager"):
            own = [row for row in rows if row.name == name]
            assert own[0].part is None
            assert own[0].rel_error is not None
            assert own[0].rel_error < 1e-4
            parts = [row.part for row in own[1:] if row.part != layer_cases.BETWEEN]
            blocks = list(block_paths(case.model, case.input_size))
            assert parts[:-1] == [layer_cases.BEFORE, *blocks]
            assert parts[-1] == layer_cases.AFTER
            assert all(row.suite == "layer" and row.rounds == 2 and row.median_us > 0 for row in own)

    def test_a_timeline_is_split_at_its_marks(self) -> None:
        timeline = layer_cases.Timeline(CPU)
        ends = [("", 0), ("a", 1000), ("a", 3000), ("b", 3000), ("b", 7000), ("", 8000)]
        parts = timeline.parts(ends)
        assert parts == {
            layer_cases.BEFORE: 1.0, "a": 2.0, "b": 4.0, layer_cases.BETWEEN: 0.0, layer_cases.AFTER: 1.0,
        }  # fmt: skip
        assert sum(parts.values()) == 8.0

    def test_the_first_call_of_a_turn_does_not_count(self) -> None:
        timeline = layer_cases.Timeline(CPU)
        for time_ns in (9, 9, 9, 900, 1, 2, 900, 3, 4):
            timeline.calls.append([("", 0), ("a", 0), ("a", 1000 * time_ns), ("", 1000 * time_ns)])
        assert layer_cases.parts_by_round(timeline, 4, 2)["a"] == [1.0, 2.0, 3.0, 4.0]

    def test_hooks_are_gone_after_the_measurement(self) -> None:
        module = torch.nn.Sequential(torch.nn.Identity())
        with layer_cases.Timeline(CPU).watching({"0": module[0]}):
            assert module[0]._forward_hooks
        assert not module[0]._forward_hooks
        assert not module[0]._forward_pre_hooks


class TestKernelBench:
    def test_the_problems_are_the_published_ones(self) -> None:
        numbers = [(problem.level, problem.number) for problem in kernelbench.PROBLEMS]
        assert numbers == [(1, number) for number in range(82, 88)] + [(3, number) for number in range(19, 25)]
        by_number = {problem.number: problem for problem in kernelbench.PROBLEMS}
        # FLOPs by hand: two for each of the taps of each value of the result.
        assert by_number[82].least_work(16, torch.float32)[1] == 2 * 9 * 16 * 64 * 510 * 510
        assert by_number[85].least_work(32, torch.float32)[1] == 2 * 21 * 32 * 128 * 126 * 250
        assert by_number[87].least_work(16, torch.float32)[1] == 2 * 64 * 16 * 128 * 1024 * 1024
        blocks = 10 * (112 * 672 * 224**2 + (25 + 192) * 672 * 112**2)
        assert by_number[21].least_work(10, torch.float32)[1] == 2 * blocks

    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("number", [82, 86, 87, 19, 22, 24])
    def test_fused_and_plain_agree(self, number: int) -> None:
        problem = next(problem for problem in kernelbench.PROBLEMS if problem.number == number)
        small = dataclasses.replace(problem, shape=(problem.shape[0], 40, 40))
        names = ["effkernels", "eager", "eager-nchw"]
        rows, refusals = kernelbench.measure_problem(
            small, 2, torch.float32, names, CPU, QUICK, threads=1, date="now"
        )  # fmt: skip
        assert refusals == []
        assert [row.name for row in rows] == names
        assert all(row.suite == "kernelbench" and row.flops and row.bytes for row in rows)
        ours, *plain = (float(row.rel_error or 0.0) for row in rows)
        assert ours <= 2 * max(plain) + torch.finfo(torch.float32).eps, (ours, plain)

    def test_images_come_in_the_format_of_the_contender(self) -> None:
        images = kernelbench.PROBLEMS[6].images(1)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert block_cases._inputs_of("eager", images) is images
        assert block_cases._inputs_of("eager-nchw", images).is_contiguous()

    def test_a_problem_larger_than_the_memory_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernelbench, "_bytes_free", lambda device: 1 << 30)
        problem = kernelbench.PROBLEMS[0]
        rows, refusals = kernelbench.measure_problem(
            problem, problem.batch, torch.float32, ["eager"], CPU, QUICK, threads=1, date="now"
        )
        assert rows == []
        assert refusals[0].reason.endswith("GB of memory in float32, and 1.1 GB are free")

    def test_published_times_are_beside_rows_of_a_gpu_alone(self) -> None:
        problem = kernelbench.PROBLEMS[0]
        row = timing.make_row(
            timing.summarise([2000.0]), suite="kernelbench", case=problem.case(problem.batch), contender="effkernels",
            device="NVIDIA H200", dtype="float32", batch=problem.batch, date="now",
        )  # fmt: skip
        row = dataclasses.replace(row, name="effkernels")
        on_cpu = dataclasses.replace(row, device="A CPU, 2 threads")
        half = dataclasses.replace(row, dtype="bfloat16")
        for rows, shown in ((row, True), (on_cpu, False), (half, False)):
            assert ("2550" in str(bench._parts_table([[rows]]))) == shown
            html = measured.page([rows]).html()
            assert ("published" in html) == shown
            assert ("2.55" in html) == shown


class TestPaper:
    def test_ratios_of_the_paper(self) -> None:
        assert [round(pair.paper_ratio, 1) for pair in paper_cases.PAIRS] == [5.7, 6.1]

    @pytest.mark.usefixtures("compiled")
    def test_two_networks_in_turns(self) -> None:
        pair = paper_cases.Pair("efficientnet_b0", FOREIGN, 1.0, 2.0, "another network")
        names = ("effkernels", "eager")
        rows, refusals = paper_cases.measure_pair(pair, names, QUICK, threads=1, date="now", img_size=32)
        assert refusals == []
        assert [row.name for row in rows] == ["efficientnet_b0 effkernels", "efficientnet_b0 eager", f"{FOREIGN} eager"]
        assert all(row.suite == "paper" and row.case == pair.case and row.batch == 1 for row in rows)

    def test_ratios_are_of_the_same_program_or_of_the_best(self) -> None:
        pair = paper_cases.PAIRS[0]
        times = {
            f"{pair.small} effkernels": 10.0, f"{pair.small} eager": 20.0, f"{pair.rival} eager": 110.0,
            f"{pair.rival} compile": 60.0,
        }  # fmt: skip
        rows = [
            dataclasses.replace(
                timing.make_row(
                    timing.summarise([us]), suite="paper", case=pair.case, contender=name, device="A CPU, 1 thread",
                    dtype="float32", batch=1, date="now", rel_error=1e-6,
                ),
                name=name,
            )
            for name, us in times.items()
        ]  # fmt: skip
        found = [(ratio.small, ratio.rival, ratio.here) for ratio in paper_cases.ratios(rows)]
        assert found == [("eager", "eager", 5.5), ("effkernels", "compile", 6.0)]
        html = measured.page(rows).html()
        assert "5.7 (ResNet-152)" in html

    def test_it_runs_on_one_core_whatever_the_settings_are(self) -> None:
        cases = list(SUITES["paper"](dataclasses.replace(SETTINGS, threads=7)))
        assert [case.case for case in cases] == [pair.case for pair in paper_cases.PAIRS]
        assert all(case.device.endswith(", 1 thread") and case.batch == 1 for case in cases)


class TestTrainingMemory:
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)")
    def test_is_measured_in_a_process_of_its_own(self) -> None:
        case = network_case("efficientnet_b0", 2, img_size=64)
        small, large = (
            peak_memory("eager", dataclasses.replace(case, batch=batch), training=True) for batch in (1, 16)
        )
        assert isinstance(small, int)
        assert isinstance(large, int)
        assert 0 < small < large

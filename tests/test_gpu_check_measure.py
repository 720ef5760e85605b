"""The measurements of `make gpu-check`: calls, blocks and networks, contenders, rows, tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from called_operators import CalledOperators

import effkernels
from benchmarks.gpu_check import blocks, measure, models, ops, shapes, training
from benchmarks.gpu_check.common import Cut, Options
from benchmarks.gpu_check.ops import BlockMeasurement
from benchmarks.gpu_check.results import Results
from effkernels.bench import timing
from effkernels.bench.networks import Refusal
from effkernels.bench.timing import Row, Statistics, read_rows
from effkernels.ops import backends
from effkernels.ops.call import OpCall, in_float64, run

CPU = torch.device("cpu")
PRODUCT = OpCall.on("pointwise_bn_act", (2, 8, 5, 4), out_channels=6, activation="identity")


class TestShapes:
    def test_of_b0(self, compiled: None) -> None:
        """The paper's table 1: 12 distinct depthwise convolutions, one stem."""
        calls = shapes.calls_of("efficientnet_b0")
        depthwise = [call for call in calls if call.op.startswith("depthwise")]
        assert len(depthwise) == 12
        assert {c.size + " " + c.window for c in depthwise} >= {"1x32x112x112 3x3 stride 1", "1x1152x7x7 5x5 stride 1"}
        assert [str(c) for c in calls if c.op == "conv_bn_act"] == ["conv_bn_act 1x3x224x224 3x3 stride 2 to 32"]
        assert OpCall("squeeze_excite_gate", channels=1152, reduced=48) in calls
        expansions = {(c.channels, c.out_channels, c.height) for c in calls if c.op == "expand_depthwise_squeeze"}
        assert expansions >= {(16, 96, 112), (192, 1152, 7)}
        projects = [call for call in calls if call.op == "pointwise_bn_act" and call.residual]
        assert projects
        assert all(call.gated and call.activation == "identity" for call in projects)

    def test_every_family_has_its_turn_from_the_start(self, compiled: None) -> None:
        order = list(ops.cases(["efficientnet_b0", "efficientnet_b4"], [256, 1, 32]))
        stacks, others = order[:3], order[3:]
        assert [one.title for one in stacks] == [
            f"efficientnet_b0 blocks.3.0-6.0 {batch}x40x28x28 to 320x7x7" for batch in (1, 8, 32)
        ]
        first = ["block" if isinstance(one, BlockMeasurement) else one.op for one in others[:5]]
        assert first == [*shapes.FAMILIES, "block"]
        assert {one.batch for one in others[:40]} == {256}
        assert len(order) == len({one.title for one in order}), "steps have names of their own"

    def test_every_call_and_block_is_measured_at_every_batch(self, compiled: None) -> None:
        order = list(ops.cases(["efficientnet_b4"], [256, 1, 32]))
        for call in shapes.calls_of("efficientnet_b4"):
            found = [one for one in order if not isinstance(one, BlockMeasurement) and one.call.with_(batch=1) == call]
            assert {one.batch for one in found} == {1, 32, 256}
        for block in blocks.blocks_of("efficientnet_b4"):
            assert len([one for one in order if isinstance(one, BlockMeasurement) and one.block == block]) == 3

    def test_of_a_family_the_call_that_moves_most_comes_first(self, compiled: None) -> None:
        first, *_, last = shapes.of_family("efficientnet_b0", "depthwise_bn_act_squeeze", 256)
        assert first.call.size == "256x96x112x112"
        assert last.call.height == 7


class TestBlocks:
    def test_of_b0(self) -> None:
        """The paper's table 1: 16 blocks; those that repeat are one."""
        found = blocks.blocks_of("efficientnet_b0")
        assert (found[0].path, found[0].shape, found[0].out) == ("blocks.0.0", (32, 112, 112), (16, 112, 112))
        assert (found[-1].shape, found[-1].out) == ((192, 7, 7), (320, 7, 7))
        assert len(found) == 12
        assert found[0].case(2) == "efficientnet_b0 blocks.0.0 2x32x112x112 to 16x112x112"

    def test_bytes_are_those_of_its_calls(self, compiled: None) -> None:
        """One operator, which reads 32 channels and writes 16; in float32 two, with the 32 between them."""
        block = blocks.blocks_of("efficientnet_b0")[0]
        pixels = 112 * 112
        gate = 2 * 32 * 4  # written by one call and read by the next
        for dtype, wanted in (
            (torch.bfloat16, 2 * pixels * (32 + 16)),
            (torch.float32, 4 * pixels * (32 + 32 + 32 + 16) + gate),
        ):
            images = [block.bytes_moved(batch, dtype) for batch in (1, 2)]
            assert images[1] - images[0] == wanted
            assert images[0] > wanted  # weights come on top

    def test_a_stack_is_the_blocks_from_a_stage_on(self, compiled: None, one_thread: None) -> None:
        """One operator on a GPU in 16-bit types, which reads no tensor between its blocks."""
        stack = blocks.stack_of("efficientnet_b0", 3)
        assert stack.bytes_moved(8, torch.bfloat16) - stack.bytes_moved(7, torch.bfloat16) == 2 * (
            40 * 28 * 28 + 320 * 7 * 7
        )
        _, measured, refused = blocks.measure_block(stack, 2, torch.float32, CPU)
        assert refused == []
        names = [one.contender for one in measured if "triton" not in one.contender]
        assert names == ["effkernels-cpu", "effkernels-cpu-one-by-one", "eager-channels-last"]

    def test_contenders_are_timed_after_parity(self, compiled: None, one_thread: None) -> None:
        block = blocks.blocks_of("efficientnet_b0")[-1]
        size, measured, refused = blocks.measure_block(block, 2, torch.float32, CPU)
        assert refused == []
        assert size == block.bytes_moved(2, torch.float32)
        names = [one.contender for one in measured if one.contender != "effkernels-triton"]
        assert names == ["effkernels-cpu", "eager-channels-last"]
        assert all(one.error is not None and one.error < 1e-5 for one in measured)


def fake_row(contender: str, median_us: float) -> Row:
    return timing.make_row(
        Statistics(median_us, median_us, median_us, 5), suite="op", case="depthwise_bn_act_squeeze 256x32x112x112",
        contender=contender, device="A GPU", dtype="bfloat16", batch=256, date="2026-01-02T03:04:05+00:00",
        floor_us=80.0, bytes=1,
    )  # fmt: skip


class TestOperators:
    @pytest.mark.parametrize(
        "case",
        [
            OpCall.on("depthwise_bn_act", (4, 8, 7, 7), stride=2),
            OpCall.on("pointwise_bn_act", (4, 8, 5, 4), out_channels=6, gated=True),
            OpCall.on("squeeze_excite_gate", (4, 16)),
        ],
        ids=lambda case: case.op,
    )
    def test_contenders_are_timed_after_parity(self, compiled: None, one_thread: None, case: OpCall) -> None:
        measured, refused = measure.measure(case, torch.float32, CPU)
        assert refused == []
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
        measured, refused = measure.measure(PRODUCT, torch.float32, CPU)
        assert "effkernels-cpu" not in [one.contender for one in measured]
        assert [(one.contender, one.ours) for one in refused] == [("effkernels-cpu", True)]
        assert "wrong: error" in refused[0].reason

    def test_the_bare_library_call_is_a_part_of_the_operator(self, one_thread: None) -> None:
        case = OpCall.on("depthwise_bn_act", (2, 8, 7, 6), 5, stride=2)
        found = measure.bare(case, CPU)
        assert found is not None
        arguments = in_float64(case.arguments())
        (result,) = run(found[1], case.op, arguments)
        x, weight = arguments["x"], arguments["weight"]
        assert torch.allclose(result, torch.nn.functional.conv2d(x, weight, stride=2, padding=2, groups=8))
        assert measure.bare(case.with_(padding=(2, 3, 2, 3)), CPU) is None
        assert measure.bare(OpCall.on("squeeze_excite_gate", (1, 8)), CPU) is None

    def test_rows_carry_bytes_and_floor(self) -> None:
        case = OpCall.on("squeeze_excite_gate", (2, 16))
        measured = [measure.Measured("effkernels-cuda-graph", Statistics(4.0, 5.0, 6.0, 7), 1e-3, 1)]
        size = case.bytes_moved(torch.bfloat16)
        (row,) = measure.rows_of(
            measured, suite="op", case="squeeze_excite_gate 2x16", batch=2, size=size, dtype=torch.bfloat16,
            device_name="A GPU", date="2026-01-02T03:04:05+00:00", bandwidth=4e6,
        )  # fmt: skip
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
            fake_row("effkernels-cuda-one-by-one-graph", 105.0),
        ]
        title, line = ops.table([rows]).splitlines()
        assert title.split()[-6:] == ["triton", "eager", "compile", "autotune", "library", "apart"]
        assert line.split()[2:] == ["100.0", "80%", "1.10x", "3.50x", "1.80x", "1.70x", "1.20x", "1.05x"]
        alone = ops.table([rows[1:4]]).splitlines()[1]
        assert alone.split()[2:] == ["110.0", "73%", "3.18x", "1.64x"]
        assert alone[71:79].strip() == "", "Triton is not compared with itself"

    def test_triton_is_a_contender_beside_the_compiled_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        can = {"cuda": True, "triton": True, "cpu": False}
        for name in can:
            decide = lambda op, name=name, **call: backends.Decision(can[name], "" if can[name] else "no")  # noqa: E731
            monkeypatch.setattr(backends, f"can_run_{name}", decide)
        case = PRODUCT
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
        chosen = []
        prepare = measure.contenders(PRODUCT, torch.float32, CPU, [])["effkernels-cpu"].prepare
        with effkernels.backend("reference"):
            call = prepare()
            with CalledOperators() as seen:
                call()
            chosen += list(seen.names)
            assert backends.selected() == "reference"
        assert "effkernels::pointwise_bn_act" in chosen

    @pytest.mark.usefixtures("interpreted", "one_thread")
    def test_launches_of_triton_are_counted(self) -> None:
        with effkernels.backend("auto"):
            measured, refused = measure.measure(OpCall.on("squeeze_excite_gate", (2, 16)), torch.float32, CPU)
        assert refused == []
        assert {one.contender: one.launches for one in measured}["effkernels-triton"] == 1

    def test_without_time_it_is_cut_and_says_so(
        self, compiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(Cut, match="0 of 11 steps, next depthwise_bn_act_squeeze of efficientnet_b0"):
            ops.operators(Options(device="cpu", seconds=0.0, smoke=True, results=tmp_path))
        assert "for lack of time (0 s) left out" in capsys.readouterr().out

    @pytest.mark.slow
    def test_smoke(self, compiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The whole part on the CPU at small sizes: a row for every operator, in the smoke test's own file."""
        monkeypatch.setattr("benchmarks.gpu_check.results.WORK", tmp_path)
        note = ops.operators(Options(device="cpu", seconds=300.0, smoke=True, results=tmp_path / "never"))
        assert note.startswith("11 cases in ")
        (file,) = (tmp_path / "results").glob("*.jsonl")
        rows = read_rows(file)
        assert len({row.case.split()[0] for row in rows if row.suite == "op"}) == 9
        assert {row.case.split(" ", 1)[1] for row in rows if row.suite == "block"} == {
            "blocks.6.0 2x192x7x7 to 320x7x7",
            "blocks.3.0-6.0 2x40x28x28 to 320x7x7",
        }
        assert all(row.floor_us for row in rows)
        assert not (tmp_path / "never").exists()


class TestModels:
    def test_both_networks_at_both_batches_come_first_then_the_compilers(self) -> None:
        steps = models.plan("cuda")
        assert [(one.model[-2:], one.batch) for one in list(steps.values())[:4]] == [
            ("b0", 1), ("b0", 256), ("b4", 1), ("b4", 256),
        ]  # fmt: skip
        rounds = [set(one.contenders) for one in list(steps.values())[::4]]
        assert rounds[0] == set(models.READY)
        assert rounds[1] - rounds[0] == {"compile"}
        assert rounds[2] - rounds[1] == {"compile-max-autotune-graph"}
        assert all(earlier <= later for earlier, later in itertools.pairwise(rounds))
        assert [one.seconds for one in steps.values()] == sorted(one.seconds for one in steps.values())

    def test_on_a_cpu_there_are_no_graphs(self) -> None:
        first = next(iter(models.plan("cpu").values()))
        assert first.contenders == ("effkernels", "eager-channels-last", "engine")

    def test_the_table_holds_the_newest_run_of_each_network_and_batch(self) -> None:
        rows = [
            network_row("effkernels-cuda", 100.0, batch=1, date="1"),
            network_row("effkernels-cuda", 90.0, batch=1, date="2"),
            network_row("compile (timm)", 180.0, batch=1, date="2"),
            network_row("effkernels-cuda", 2000.0, batch=256, date="1"),
        ]
        lines = models.table(rows).splitlines()
        assert [line.split()[-2:] for line in lines[1:2]] == [["90.0", "2000.0"]]
        assert lines[2].split()[-1] == "180.0"
        assert "100.0" not in models.table(rows)

    @pytest.mark.parametrize(
        ("contender", "reason", "ours"),
        [
            ("effkernels", "wrong: off by 1", True),
            ("engine", "failed: RuntimeError: x", True),
            ("engine", "not available: No module named timm", False),
            ("compile", "failed: x", False),
        ],
    )
    def test_what_counts_as_our_mistake(self, contender: str, reason: str, ours: bool) -> None:
        assert models._is_ours(Refusal(contender, "b0", reason)) == ours


def network_row(contender: str, median_us: float, batch: int, date: str) -> Row:
    return timing.make_row(
        Statistics(median_us, median_us, median_us, 5), suite="model", case="efficientnet_b0@224",
        contender=contender, device="A GPU", dtype="bfloat16", batch=batch, date=date,
    )  # fmt: skip


class TestResults:
    def test_rows_are_written_at_once_and_copied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setenv("OUT", str(out))
        monkeypatch.setenv("EFFKERNELS_COMMIT", "a" * 40)
        results = Results(Options(device="cpu", results=tmp_path / "results"))
        results.add([fake_row("effkernels-cuda", 100.0)])
        assert read_rows(results.file) == read_rows(out / results.file.name)
        assert results.file.parent == tmp_path / "results"

    def test_each_run_has_a_date_of_its_own(self, tmp_path: Path) -> None:
        results = Results(Options(device="cpu", results=tmp_path))
        dates = [results.date]
        for _ in range(2):
            results.restart()
            dates.append(results.date)
        assert len(set(dates)) == 3
        assert dates == sorted(dates)


def test_gradients_of_frozen_norms_are_as_exact_as_pytorchs(compiled: None, one_thread: None) -> None:
    ok, error, limit = training.error_of("cpu", CPU, 32)
    assert ok, f"error {error:.1e}, limit {limit:.1e}"

"""The measuring core, the contenders, and the report: nothing here asserts how fast something is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import console_examples, report
from effkernels import environment
from effkernels.bench import overhead, timing
from effkernels.bench.check import sample_model
from effkernels.bench.contenders import CONTENDERS, Contender, NetworkCase, ReadyContender
from effkernels.bench.networks import Options, network_case, run_case, steps
from effkernels.bench.op_timing import copied
from effkernels.bench.peak_memory import peak_memory
from effkernels.bench.precision import PRECISIONS, Precision
from effkernels.bench.samples import sample_foreign
from effkernels.bench.timing import Row, Statistics
from effkernels.cli import main
from effkernels.ops.call import OpCall, tensors

# The fields that a row must have, in order; p99_us is beside p95_us.
FIELDS = [
    "suite", "case", "contender", "device", "dtype", "batch", "median_us", "p95_us", "p99_us", "images_per_s",
    "peak_bytes", "rel_error", "floor_us", "bytes", "launches", "commit", "dirty", "date", "versions",
    "name", "rounds", "round_low_us", "round_high_us", "spread", "host_us", "calibration", "drift", "steady",
    "attempts", "machine", "part", "flops",
]  # fmt: skip
SMALL = NetworkCase("efficientnet_b0", 32, 1, threads=1)
QUICK = Options(warmup=1, rounds=2, memory=False, calibrate=False)


def make_row(**changes: object) -> Row:
    row = timing.make_row(
        Statistics(1000.0, 2000.0, 3000.0, 10),
        suite="model",
        case="efficientnet_b0@224",
        contender="effkernels-cpu",
        device="A CPU, 2 threads",
        dtype="float32",
        batch=4,
        date="2026-01-02T03:04:05+00:00",
    )
    return dataclasses.replace(row, **changes)  # type: ignore[arg-type]


class TestStatistics:
    def test_of_a_known_series(self) -> None:
        statistics = timing.summarise([float(value) for value in range(100, -1, -1)])
        assert statistics == Statistics(50.0, 95.0, 99.0, 101)

    def test_percentiles_are_interpolated(self) -> None:
        statistics = timing.summarise([10.0, 20.0])
        assert (statistics.median_us, statistics.p95_us) == pytest.approx((15.0, 19.5))

    def test_an_outlier_moves_p99_but_not_the_median(self) -> None:
        statistics = timing.summarise([5.0] * 99 + [5000.0])
        assert statistics.median_us == statistics.p95_us == 5.0
        assert statistics.p99_us > 5.0

    @given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40))
    def test_order(self, samples: list[float]) -> None:
        got = timing.summarise(samples)
        tolerance = 1e-9 * max(samples)
        assert min(samples) - tolerance <= got.median_us <= got.p95_us + tolerance
        assert got.p95_us <= got.p99_us + tolerance <= max(samples) + 2 * tolerance

    @pytest.mark.parametrize("samples", [[], [1.0, math.nan], [math.inf]])
    def test_bad_samples(self, samples: list[float]) -> None:
        with pytest.raises(ValueError, match="summarise"):
            timing.summarise(samples)


class TestTurns:
    def test_every_contender_has_its_turn_in_every_round(self) -> None:
        log: list[str] = []
        turns: list[str] = []

        def contender(name: str) -> Callable[[int], None]:
            def run(number: int) -> None:
                log.append(name)
                time.sleep(0.03)  # so long that a turn is one sample and one call before it

            return run

        names = ["a", "b", "c"]
        times = timing.time_in_turns(
            {name: contender(name) for name in names}, warmup=1, rounds=4, advance=turns.append
        )
        assert len(turns) == 12
        rounds = [turns[start : start + 3] for start in range(0, 12, 3)]
        assert all(sorted(members) == names for members in rounds)
        assert len({tuple(members) for members in rounds}) > 1, "the order never changes"
        # After the warm-up the calls follow the turns: one that is not counted, one that is.
        assert log[-24:] == [name for name in turns for _ in range(2)]
        assert all(len(samples) == 4 for samples in times.values())
        assert all(sample >= 30e3 for samples in times.values() for sample in samples)

    def test_each_call_gets_the_next_input(self) -> None:
        numbers: list[int] = []
        timing.time_in_turns({"one": numbers.append}, warmup=2, rounds=2)
        assert numbers == list(range(len(numbers)))

    def test_short_calls_are_averaged(self) -> None:
        calls = 0

        def run(number: int) -> None:
            nonlocal calls
            calls += 1

        times = timing.time_in_turns({"nothing": run}, warmup=1, rounds=2)["nothing"]
        assert calls > 20 * len(times), "a call of nanoseconds needs many calls per sample"
        assert max(times) < 1000, "a sample is the time of one call"

    @pytest.mark.parametrize(("runs", "options"), [({}, {}), ({"a": abs}, {"rounds": 0}), ({"a": abs}, {"warmup": 0})])
    def test_bad_arguments(self, runs: dict[str, Callable[[int], object]], options: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="time_in_turns"):
            timing.time_in_turns(runs, **options)


@given(st.integers(1, 2**40), st.integers(1, 2**30))
def test_rotated_inputs_exceed_the_cache_or_a_bound(bytes_each: int, cache: int) -> None:
    count = timing.input_count(bytes_each, cache)
    assert 2 <= count <= 64
    assert count == 2 or count * bytes_each <= 512 << 20
    assert count * bytes_each >= 2 * cache or count == 64 or (count + 1) * bytes_each > 512 << 20


class TestRows:
    def test_carry_every_field(self) -> None:
        values = json.loads(make_row().to_json())
        assert list(values) == FIELDS
        assert values["images_per_s"] == 4000.0
        assert {"torch", "cuda", "triton", "driver", "python"} <= set(values["versions"])
        assert values["floor_us"] is values["bytes"] is values["launches"] is None

    def test_file_is_appended_to_and_read_back(self, tmp_path: Path) -> None:
        file = tmp_path / "new folder" / "rows.jsonl"
        first, second = make_row(), make_row(contender="eager", peak_bytes=17, rel_error=1e-7)
        timing.append_rows(file, [first])
        before = file.read_text()
        timing.append_rows(file, [second])
        assert file.read_text().startswith(before)
        assert timing.read_rows(file) == [first, second]

    def test_rows_from_before_the_later_fields_are_read(self, tmp_path: Path) -> None:
        row = make_row(name="effkernels", spread=0.1)
        values = {name: value for name, value in json.loads(row.to_json()).items() if name in FIELDS[:19]}
        (tmp_path / "old.jsonl").write_text(json.dumps(values) + "\n")
        assert timing.read_rows(tmp_path / "old.jsonl") == [make_row()]

    @pytest.mark.parametrize("line", ["no json", "{}", "[1]"])
    def test_damaged_file_names_the_line(self, tmp_path: Path, line: str) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text(make_row().to_json() + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a result row"):
            timing.read_rows(file)

    def test_what_is_not_a_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            make_row(rel_error=math.nan).to_json()


class TestEnvironment:
    def test_names(self) -> None:
        cpu = torch.device("cpu")
        assert environment.device_name(cpu, 1).endswith(", 1 thread")
        assert environment.device_name(cpu, 2).endswith(", 2 threads")
        assert environment.file_stem("AMD EPYC (TM), 2 threads") == "amd-epyc-tm-2-threads"
        assert environment.last_level_cache_bytes(cpu) > 0

    def test_commit_is_of_this_tree_or_unknown(self) -> None:
        commit, dirty = environment.commit()
        assert (commit is None) == (dirty is None)
        assert commit is None or len(commit) == 40


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision(name: str, device: str) -> None:
    precision = Precision.of(name, device)
    if name == "amp":
        assert precision.name == {"cpu": "amp_bfloat16", "cuda": "amp_float16"}[device]
    else:
        assert precision.name == name
    if name.startswith("amp"):
        assert precision.dtype == torch.float32
        assert precision.computes_in == precision.autocast != torch.float32
    else:
        assert str(precision.computes_in) == f"torch.{name}"


class TestSampleModel:
    def test_is_the_same_each_time_and_does_not_change_the_generator(self) -> None:
        state = torch.random.get_rng_state()
        first = sample_model.__wrapped__("efficientnet_b0", 3)
        assert torch.equal(torch.random.get_rng_state(), state)
        for key, value in sample_model.__wrapped__("efficientnet_b0", 3).state_dict().items():
            assert torch.equal(value, first.state_dict()[key])

    def test_signal_neither_dies_nor_explodes(self) -> None:
        with torch.inference_mode():
            logits = sample_model("efficientnet_b0")(torch.randn(3, 3, 224, 224))
        assert 1e-2 < logits.std() < 1e2
        assert (logits[0] - logits[1]).norm() > 0.05 * logits[0].norm(), "the logits must depend on the image"

    def test_has_no_hooks_left(self) -> None:
        assert not any(module._forward_pre_hooks for module in sample_model("efficientnet_b0").modules())

    def test_a_function_that_loads_weights_keeps_them(self, tmp_path: Path) -> None:
        (tmp_path / "networks.py").write_text(
            "from torch import nn\n"
            "def fresh():\n"
            "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())\n"
            "def trained():\n"
            "    model = fresh()\n"
            "    model[1].running_var.fill_(2)\n"
            "    model[1].weight.data.fill_(0.5)\n"
            "    return model\n"
        )
        trained, fresh = (sample_foreign(f"{tmp_path / 'networks.py'}:{name}", 3, 16) for name in ("trained", "fresh"))
        assert bool((trained.get_parameter("1.weight") == 0.5).all())
        assert not bool((fresh.get_buffer("1.running_var") == 1).any())


class TestContenders:
    @pytest.mark.parametrize("name", ["effkernels", "eager", "eager-channels-last", "timm", "torchvision"])
    def test_run_with_the_same_weights(self, name: str) -> None:
        if reason := CONTENDERS[name].unavailable(SMALL):
            pytest.skip(reason)
        rows, refusals = run_case(SMALL, [name], QUICK, date="now")
        assert refusals == []
        assert rows[0].contender.startswith(name)
        assert rows[0].rel_error is not None
        assert 0 < rows[0].rel_error < 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["compile", "onnxruntime", "openvino"])
    def test_compilers_run_with_the_same_weights(self, name: str, tmp_path: Path) -> None:
        """A network of two blocks: to compile a whole EfficientNet takes a minute."""
        (tmp_path / "networks.py").write_text(
            "from torch import nn\n"
            "from effkernels.nn import MBConv\n"
            "def two_blocks():\n"
            "    blocks = [MBConv(8, 8, se_channels=2), MBConv(8, 16, stride=2)]\n"
            "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]\n"
            "    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks, *head)\n"
        )
        case = network_case(f"{tmp_path / 'networks.py'}:two_blocks", 1, img_size=32)
        if reason := CONTENDERS[name].unavailable(case):
            pytest.skip(reason)
        rows, refusals = run_case(case, [name], QUICK, date="now")
        assert refusals == []
        assert rows[0].rel_error is not None
        assert 0 < rows[0].rel_error < 1e-4

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["onnxruntime-int8", "openvino-int8"])
    def test_int8_is_another_computation_that_says_its_error(self, name: str) -> None:
        if reason := CONTENDERS[name].unavailable(SMALL):
            pytest.skip(reason)
        rows, refusals = run_case(SMALL, [name], QUICK, date="now")
        assert refusals == []
        assert rows[0].contender.startswith(f"{name} (")
        assert rows[0].rel_error is not None
        assert 1e-4 < rows[0].rel_error < 0.5
        assert "--precision float32" in str(CONTENDERS[name].unavailable(dataclasses.replace(SMALL, precision="amp")))

    def test_tensorrt_names_its_install_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        case = dataclasses.replace(SMALL, device="cuda")
        assert CONTENDERS["tensorrt"].unavailable(case) == "not available: pip install torch_tensorrt"
        assert CONTENDERS["tensorrt"].unavailable(SMALL) == "only for cuda, not cpu"

    @pytest.mark.parametrize("precision", ["bfloat16", "amp"])
    def test_low_precision(self, precision: str) -> None:
        case = dataclasses.replace(SMALL, precision=precision)
        rows, refusals = run_case(case, ["effkernels", "eager"], QUICK, date="now")
        assert [refusal.contender for refusal in refusals] in ([], ["effkernels"])
        assert all(row.dtype == case.numbers.name for row in rows)

    def test_plain_network_without_timm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_timm() -> None:
            raise ImportError("timm is not installed; pip install timm")

        monkeypatch.setattr("effkernels.models.peers.import_timm", no_timm)
        rows, refusals = run_case(SMALL, ["eager", "timm"], QUICK, date="now")
        assert [row.contender for row in rows] == ["eager (reference)"]
        assert [(refusal.contender, refusal.reason) for refusal in refusals] == [
            ("timm", "not available: timm is not installed; pip install timm")
        ]

    @pytest.mark.parametrize("name", CONTENDERS)
    def test_say_in_one_line_why_not(self, name: str) -> None:
        for precision in ("float32", "float16"):
            for device in ("cpu", "cuda"):
                if device == "cuda" and not torch.cuda.is_available() and "cuda" in CONTENDERS[name].devices:
                    continue
                case = dataclasses.replace(SMALL, precision=precision, device=device)
                reason = CONTENDERS[name].unavailable(case)
                assert reason is None or ("\n" not in reason and reason)

    def test_missing_packages_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
        reason = CONTENDERS["openvino"].unavailable(SMALL)
        assert reason is not None
        assert reason.startswith("not available: pip install ")
        assert "openvino" in reason

    @pytest.mark.parametrize(
        "model",
        [
            "timm:mobilenetv3_small_050",
            "torchvision:mobilenet_v2",
            pytest.param("hf:mobilenet_v2", marks=pytest.mark.thorough),
        ],
    )
    def test_models_of_other_libraries(self, model: str) -> None:
        library = model.partition(":")[0]
        case = network_case(model, 1, img_size=32)
        names = ["effkernels", "optimized", "engine", "eager", "timm"]
        rows, refusals = run_case(case, names, QUICK, date="now")
        for row in rows:
            assert row.case == f"{model}@32"
            assert library in row.contender
            assert row.rel_error is not None
            assert 0 < row.rel_error < 1e-4
        refused = [refusal.contender for refusal in refusals]
        assert refused == (["effkernels"] if library == "timm" else ["effkernels", "timm"])
        assert refusals[0].reason == f"runs this package's own networks; optimized and engine run {model}"

    def test_models_nobody_else_has(self) -> None:
        reason = CONTENDERS["torchvision"].unavailable(dataclasses.replace(SMALL, model="tf_efficientnet_b0"))
        assert reason is not None


class TestRunCase:
    def add(self, monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[[NetworkCase], ReadyContender]) -> None:
        contender = Contender(name, "made up", ("cpu",), lambda case: None, prepare)
        monkeypatch.setitem(CONTENDERS, name, contender)

    def test_a_wrong_answer_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        right = CONTENDERS["eager"].prepare(SMALL)
        wrong = dataclasses.replace(right, run=lambda images: right.run(images) * 1.001)
        self.add(monkeypatch, "wrong", lambda case: wrong)
        rows, refusals = run_case(SMALL, ["wrong", "eager"], QUICK, date="now")
        assert [row.contender for row in rows] == [right.label]
        assert refusals[0].contender == "wrong"
        assert refusals[0].reason.startswith("wrong: off by 1.0e-03 from float64")

    @pytest.mark.parametrize("output", [torch.full((1, 1000), math.nan), torch.zeros(1, 10)])
    def test_not_a_number_and_another_shape_are_wrong(
        self, monkeypatch: pytest.MonkeyPatch, output: torch.Tensor
    ) -> None:
        self.add(monkeypatch, "odd", lambda case: ReadyContender("odd", lambda images: images, lambda images: output))
        rows, refusals = run_case(SMALL, ["odd"], QUICK, date="now")
        assert rows == []
        assert refusals[0].reason.startswith("wrong: off by inf")

    def test_a_contender_that_fails_does_not_stop_the_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(case: NetworkCase) -> ReadyContender:
            raise RuntimeError("no\nsuch luck")

        self.add(monkeypatch, "failing", fail)
        advanced: list[str] = []
        names = ["failing", "eager"]
        rows, refusals = run_case(SMALL, names, QUICK, date="now", advance=advanced.append)
        assert len(rows) == 1
        assert refusals[0].reason == "failed: RuntimeError: no such luck"
        assert len(advanced) == steps(names, QUICK)

    def test_threads_are_set_and_put_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        right = CONTENDERS["eager"].prepare(SMALL)

        def run(images: torch.Tensor) -> object:
            seen.append(torch.get_num_threads())
            return right.run(images)

        self.add(monkeypatch, "counting", lambda case: dataclasses.replace(right, run=run))
        before = torch.get_num_threads()
        rows, _ = run_case(dataclasses.replace(SMALL, threads=before + 1), ["counting"], QUICK, date="now")
        assert set(seen) == {before + 1}
        assert torch.get_num_threads() == before
        assert rows[0].device.endswith(f", {before + 1} threads")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)")
class TestMemory:
    def test_growth_is_seen(self) -> None:
        """In a process of its own: in one of other tests, what their threads hold and let go counts as well."""
        code = (
            "import torch\n"
            "from effkernels.bench.contenders import CONTENDERS, Contender, NetworkCase, ReadyContender\n"
            "from effkernels.bench.peak_memory import measure_here\n"
            "run = lambda images: torch.ones(100 << 20, dtype=torch.uint8)  # every page is written\n"
            "ready = ReadyContender('hungry', lambda images: images, run)\n"
            "CONTENDERS['hungry'] = Contender('hungry', 'made up', ('cpu',), lambda case: None, lambda case: ready)\n"
            "print(measure_here('hungry', NetworkCase('efficientnet_b0', 32, 1, threads=1)))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert 90 << 20 < int(done.stdout or 0) < 130 << 20, done.stdout + done.stderr

    def test_in_a_process_of_its_own(self) -> None:
        peak = peak_memory("eager", SMALL)
        assert isinstance(peak, int)
        assert 0 < peak < 1 << 30

    def test_failure_is_one_line(self) -> None:
        reason = peak_memory("no such contender", SMALL)
        assert isinstance(reason, str)
        assert "no such contender" in reason
        assert "\n" not in reason


class TestOperatorCalls:
    def test_bytes_are_those_that_no_version_can_avoid(self) -> None:
        call = OpCall.on("pointwise_bn_act", (2, 8, 4, 4), out_channels=16)
        images, weights, vectors = 2 * 8 * 16 + 2 * 16 * 16, 16 * 8, 4 * 16
        assert call.bytes_moved(torch.float32) == 4 * (images + weights + vectors)
        assert call.bytes_moved(torch.bfloat16) == 2 * (images + weights) + 4 * vectors

    @pytest.mark.parametrize("op", ["depthwise_bn_act", "conv_bn_act"])
    def test_copies_have_tensors_of_their_own_in_channels_last(self, op: str) -> None:
        arguments = OpCall.on(op, (1, 4, 5, 5), out_channels=3).arguments()
        for name, t in tensors(copied(arguments)):
            assert torch.equal(t, arguments[name])
            assert t.data_ptr() != arguments[name].data_ptr()
            assert t.ndim != 4 or t.is_contiguous(memory_format=torch.channels_last)


class TestReport:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        old, new = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
        rows = [
            make_row(date=old, median_us=9000.0),
            make_row(date=old, contender="forgotten"),
            make_row(date=new),
            make_row(date=new, contender="eager (timm)", median_us=2500.0, rel_error=2e-7, peak_bytes=3_000_000),
            make_row(date=old, suite="op", case="conv_bn_act 1x3x8x8", median_us=12.5),
        ]
        timing.append_rows(tmp_path / "a-cpu-2-threads.jsonl", rows)
        (tmp_path / "README.md").write_text(f"before\n{report.SECTION.begin}\nold\n{report.SECTION.end}\nafter\n")
        return tmp_path

    def run(self, folder: Path, *more: str) -> int:
        return report.main(["--results-folder", str(folder), "--readme", str(folder / "README.md"), *more])

    def test_only_the_newest_run_of_a_case_counts(self, folder: Path) -> None:
        assert self.run(folder) == 0
        text = (folder / "REPORT.md").read_text()
        assert "| eager (timm) | 2.50 ms | 2.00 ms | 3.00 ms | 4,000 | 3.0 | 2.0e-07 | 2.50 |" in text
        assert "forgotten" not in text
        assert "9.00 ms" not in text
        assert "conv_bn_act 1x3x8x8" in text

    def test_readme_gets_the_networks_between_the_markers(self, folder: Path) -> None:
        self.run(folder)
        readme = (folder / "README.md").read_text()
        assert readme.startswith("before\n")
        assert readme.endswith("after\n")
        assert "old" not in readme
        assert "| | effkernels-cpu | eager (timm) |" in readme
        assert " | 1.00 ms | 2.50 ms |" in readme
        assert "conv_bn_act" not in readme

    def test_check_reports_what_is_out_of_date(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(folder, "--check") == 1
        assert "out of date" in capsys.readouterr().err
        assert self.run(folder) == 0
        assert self.run(folder, "--check") == 0

    def test_pictures_are_made(self, folder: Path) -> None:
        self.run(folder)
        for suite in ("model", "op"):
            assert (folder / f"a-cpu-2-threads-{suite}.svg").read_text().startswith("<svg ")
            assert f"(a-cpu-2-threads-{suite}.svg)" in (folder / "REPORT.md").read_text()

    def test_machines_with_the_same_networks_are_side_by_side(self, folder: Path) -> None:
        other = "B CPU, 2 threads"
        timing.append_rows(
            folder / "b-cpu.jsonl",
            [
                make_row(device=other, median_us=4000.0),
                make_row(device=other, contender="engine", median_us=3000.0),
                make_row(device="A GPU", case="efficientnet_b4@380", batch=256),
            ],
        )
        assert self.run(folder) == 0
        readme = (folder / "README.md").read_text()
        assert "EfficientNet on A CPU, 2 threads / B CPU, 2 threads, median time of a call:" in readme
        assert "| | effkernels-cpu | eager (timm) | engine |" in readme
        assert " | 1.00 / 4.00 ms | 2.50 / - ms | - / 3.00 ms |" in readme
        assert "EfficientNet on A GPU, median time of a call:" in readme
        text = (folder / "REPORT.md").read_text()
        assert "| effkernels-cpu | 1.00 ms | 1.00 | 4.00 ms | 1.00 |" in text
        assert "| engine |  |  | 3.00 ms | 0.75 |" in text

    def test_without_results(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text(f"{report.SECTION.begin}{report.SECTION.end}")
        assert self.run(tmp_path) == 0
        assert "No results" in (tmp_path / "README.md").read_text()

    def test_missing_marker(self) -> None:
        with pytest.raises(ValueError, match="must be there once"):
            report.SECTION.replaced("no markers", "section")


class TestConsoleExamples:
    def test_outputs_are_replaced(self, tmp_path: Path) -> None:
        text = "one\n```console\n$ echo first\nold\nolder\n$ pwd\n```\n```\n$ not run\n```\n"
        expected = f"one\n```console\n$ echo first\nfirst\n$ pwd\n{tmp_path}\n```\n```\n$ not run\n```\n"
        assert console_examples.with_outputs(text, tmp_path) == expected

    def test_a_command_that_fails_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="exit status 3: no"):
            console_examples.with_outputs("```console\n$ (echo no >&2; exit 3) | tail -n 1\n```\n", tmp_path)


def test_report_of_this_repository_is_up_to_date() -> None:
    """The tables of README.md and REPORT.md are those that the recorded rows give."""
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize(
    "name",
    ["cpu_layers", "cpu_ratios", "fuzz", "gpu_check", "instruction_counts", "kernel_economy", "network_ratios",
     "report", "soak"],
)  # fmt: skip
def test_help_of_each_program(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.startswith("usage: ")


def test_report_measures_what_bench_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []

    def bench(arguments: list[str]) -> int:
        called.append(arguments)
        assert main([*arguments[:-2], "--list"]) == 0
        return 0

    monkeypatch.setattr(report, "effkernels", bench)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.SECTION.begin}\n{report.SECTION.end}\n")
    arguments = ["--measure", "--results-folder", str(tmp_path / "results"), "--readme", str(readme)]
    assert report.main(arguments) == 0
    cases = capsys.readouterr().out
    for model in ("efficientnet_b0@224", "efficientnet_b4@380"):
        for batch in (1, 16):
            for dtype in ("float32", "bfloat16"):
                assert f"model {model}, {dtype}, batch {batch}: effkernels, engine" in cases
    (file,) = {arguments[-1] for arguments in called}
    assert Path(file).parent == tmp_path / "results"
    assert Path(file).stem == environment.file_stem(
        environment.device_name(torch.device("cpu"), torch.get_num_threads())
    )
    monkeypatch.setattr(report, "effkernels", lambda arguments: 1)
    assert report.main(arguments) == 1


@pytest.mark.parametrize("face", overhead.CONTENDERS)
@pytest.mark.usefixtures("compiled")
def test_overhead_of_a_call(face: str, benchmark: Callable[[Callable[[], object]], object]) -> None:
    """Reports the time of one call with next to no work; that the call works is all that is asserted."""
    with torch.inference_mode():
        call = overhead.calls(torch.device("cpu"))[face]
        benchmark.pedantic(call, rounds=5, iterations=20, warmup_rounds=1)  # type: ignore[attr-defined]
        result = call()
    result = result[0] if isinstance(result, tuple) else result
    assert isinstance(result, torch.Tensor)
    assert result.shape == (1, 8, 1, 1)

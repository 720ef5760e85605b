"""The command line as a user sees it: output, JSON, exit status, and the messages for wrong arguments."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import skimage.data
import torch

import effkernels
from effkernels import _library, console
from effkernels.bench import check
from effkernels.bench.check import Finding
from effkernels.bench.contenders import CONTENDERS
from effkernels.bench.timing import Row, read_rows
from effkernels.cli import main
from effkernels.commands import common
from effkernels.ops import backends, parity
from effkernels.triton import INTERPRETED, MOST_SCALED_ALONE


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for name in ("astronaut", "chelsea", "coffee"):
        image = PIL.Image.fromarray(getattr(skimage.data, name)())
        image.resize((96, 72)).save(folder / f"{name}.jpg")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of a command line."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    status, out, _ = run(capsys, *arguments, "--json")
    return status, json.loads(out)


class TestMain:
    def test_module_runs(self) -> None:
        done = subprocess.run([sys.executable, "-m", "effkernels", "--version"], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout == f"effkernels {effkernels.__version__}\n"

    def test_import_stays_light(self) -> None:
        heavy = "timm", "torchvision", "matplotlib", "PIL", "onnxruntime", "openvino", "rich", "psutil", "torch._dynamo"
        code = f"import sys, effkernels; print([name for name in {heavy} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "[]\n", done.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "required"),
            (["fly"], "invalid choice: 'fly'"),
            (["info", "--frobnicate"], "--frobnicate"),
            (["predict"], "no IMAGE given"),
            (["predict", "x.png", "--topk", "0"], "'0' is not a whole number of at least 1"),
            (["predict", "x.png", "--batch-size", "two"], "'two' is not a whole number"),
            (["predict", "x.png", "--precision", "int8"], "float32"),
            (["predict", "x.png", "--model", "efficientnet_b9"], "--model: unknown model 'efficientnet_b9'"),
            (["predict", "x.png", "--weights", "nowhere.pth"], "nowhere.pth"),
            (["predict", "x.png", "--labels", "nowhere.txt"], "--labels nowhere.txt"),
            (["bench", "--model", "resnet50"], "--model: unknown model 'resnet50'"),
            (["bench", "--contender", "magic"], "--contender magic: not known; allowed: all, effkernels, eager"),
            (["bench", "--batch-size", "-1"], "'-1' is not a whole number"),
            (["bench", "--device", "tpu9"], "--device tpu9: not a device; allowed: cpu, cuda, cuda:N"),
            (["bench", "--device", "mps"], "--device mps: allowed: cpu, cuda, cuda:N"),
            (["check", "--device", "cuda:99"], "--device cuda:99"),
            (["tune", "--ops", "softmax"], "--ops softmax: not an operator; allowed: depthwise_bn_act, "),
            (["tune", "--precision", "int8"], "float32"),
            (["tune", "--model", "resnet50"], "--model: unknown model 'resnet50'"),
            (["tune", "--device", "mps"], "--device mps: allowed: cpu, cuda, cuda:N"),
        ],
    )
    def test_wrong_arguments(self, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str) -> None:
        status, out, err = run(capsys, *arguments)
        assert status == 2
        assert out == ""
        assert message in err

    def test_help_names_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "--help")
        assert status == 0
        assert all(name in out for name in ("info", "check", "predict", "bench", "tune"))

    def test_closed_pipe_is_no_traceback(self) -> None:
        command = f"{sys.executable} -m effkernels info --json | head -n 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.stdout == "{\n"
        assert "Traceback" not in done.stderr


class TestInfo:
    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, report = run_json(capsys, "info")
        assert status == 0
        assert report["version"] == effkernels.__version__
        assert report["versions"]["torch"] == torch.__version__
        assert report["library"]["loaded"] == _library.is_loaded()
        assert report["devices"][0]["device"] == "cpu"
        for decision in report["operators"]:
            assert decision["ok"] != bool(decision["reason"]), "a refusal has a reason, and nothing else has"

    def test_text_has_the_facts(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "info")
        assert status == 0
        for fact in (effkernels.__version__, torch.__version__, "library", "triton", "backend"):
            assert fact in out

    @pytest.mark.usefixtures("compiled")
    def test_active_instruction_set(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.ops.effkernels.cpu_isa("plain")
        try:
            assert run_json(capsys, "info")[1]["devices"][0]["kernel_isa"] == "plain"
        finally:
            torch.ops.effkernels.cpu_isa("auto")

    def test_without_the_library_says_what_runs_where(self) -> None:
        pytest.importorskip("triton")
        program = """
import sys
import torch

def hidden(path):
    raise OSError("hidden")

torch.ops.load_library = hidden
from effkernels.cli import main
main(sys.argv[1:])
"""

        def info(*arguments: str) -> str:
            command = [sys.executable, "-c", program, "info", *arguments]
            environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND")}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout

        report = json.loads(info("--json"))
        gpus = [device for device in report["runs"] if device != "cpu"]
        assert gpus
        for op in backends.OPERATORS:
            assert report["runs"]["cpu"][op] == "reference"
            assert all(report["runs"][gpu][op] == "triton" for gpu in gpus)
        lines = [line.split() for line in info().splitlines()]
        assert ["cpu", "reference:", "every", "operator"] in lines
        assert any(line[-3:] == ["triton:", "every", "operator"] for line in lines)
        assert any(line[0] == "depthwise_bn_act_se" and str(MOST_SCALED_ALONE) in line for line in lines if line)


class TestTune:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    @pytest.mark.skipif(INTERPRETED, reason="Triton interprets here, which tunes: test_tuner.py")
    def test_without_a_gpu_it_says_so_in_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ((), ("--dry-run",), ("--clear",)):
            status, out, err = run(capsys, "tune", *arguments)
            assert (status, out) == (2, "")
            (line,) = err.splitlines()
            assert line == f"effkernels tune: no GPU: {common.why_no_gpu()}"
        status, _, err = run(capsys, "tune", "--device", "cpu")
        assert status == 2
        assert "--device cpu: there is nothing to tune: " in err


class TestCheck:
    @pytest.mark.usefixtures("compiled")
    def test_passes_here(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "check", "--device", "cpu")
        assert status == 0, out
        for op in backends.OPERATORS:
            for dtype in ("float32", "bfloat16", "float16"):
                assert any(
                    line.startswith("ok") and f" {op} " in line and f" {dtype} " in line for line in out.splitlines()
                )
        assert "efficientnet_b0 at 224" in out

    def test_failure_is_the_exit_status(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        findings = [
            Finding("fine", "cpu", "float32", True, 1e-7, 2e-7),
            Finding("not here", "triton", "-", None, reason="no kernel"),
            Finding("broken", "cpu", "float32", False, 1e-3, 2e-7),
        ]
        monkeypatch.setattr("effkernels.commands.check.run_checks", lambda device: iter(findings))
        status, out, _ = run(capsys, "check", "--device", "cpu")
        assert status == 1
        assert [line[:4] for line in out.splitlines()] == ["ok  ", "--  ", "FAIL", "1 of"]
        status, report = run_json(capsys, "check", "--device", "cpu")
        assert (status, report["ok"]) == (1, False)
        assert [finding["ok"] for finding in report["findings"]] == [True, None, False]

    def test_nothing_to_check_is_no_success(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("effkernels.commands.check.run_checks", lambda device: iter(()))
        status, _, err = run(capsys, "check", "--device", "cpu")
        assert status == 1
        assert "nothing to check" in err

    def test_rule_has_no_slack(self) -> None:
        truth = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
        own = parity.Errors(1e-3, 1e-3)
        plain = truth.float() * (1 + own.l2)
        limit = parity.limits(plain, truth)
        assert limit.l2 == pytest.approx(2 * own.l2 + 2.0**-24, rel=1e-3)
        assert parity.judge([truth * (1 + 1.99e-3)], [plain], [truth])[0]
        assert not parity.judge([truth * (1 + 2.01e-3)], [plain], [truth])[0]

    def test_where_the_truth_is_zero_only_zero_passes(self) -> None:
        zero = torch.zeros(3)
        assert parity.judge([zero], [zero], [zero.double()])[0]
        assert not parity.judge([zero + 1e-30], [zero], [zero.double()])[0]

    @pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.ones(3)])
    def test_not_a_number_and_another_shape_fail(self, bad: torch.Tensor) -> None:
        truth = torch.ones(2, dtype=torch.float64)
        assert not parity.judge([bad], [torch.ones(2)], [truth])[0]

    def test_a_kernel_that_raises_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def explode(*arguments: object, **options: object) -> None:
            raise RuntimeError("boom")

        monkeypatch.setattr("effkernels.ops.conv_bn_act", explode)
        case = next(case for case in check.op_calls() if case.op == "conv_bn_act")
        finding = check.check_op(case, "reference", torch.float32, torch.device("cpu"))
        assert finding.ok is False
        assert finding.reason == "raised RuntimeError: boom"


class TestPredict:
    small = ("--img-size", "64", "--device", "cpu")

    def test_json(self, capsys: pytest.CaptureFixture[str], album: Path) -> None:
        status, report = run_json(capsys, "predict", album, "--topk", "3", *self.small)
        assert status == 0
        assert report["failures"] == []
        assert [Path(prediction["file"]).name for prediction in report["predictions"]] == [
            "astronaut.jpg", "chelsea.jpg", "coffee.jpg",
        ]  # fmt: skip
        for prediction in report["predictions"]:
            probabilities = [score["probability"] for score in prediction["scores"]]
            assert len(probabilities) == 3
            assert probabilities == sorted(probabilities, reverse=True)

    def test_example_comes_with_scikit_image(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, report = run_json(capsys, "predict", "--example", *self.small)
        assert status == 0
        assert [Path(prediction["file"]).name for prediction in report["predictions"]] == ["astronaut.png"]

    def test_random_weights_are_announced(self, capsys: pytest.CaptureFixture[str], album: Path) -> None:
        _, _, err = run(capsys, "predict", album / "coffee.jpg", *self.small)
        assert "WARNING" in err
        assert "RANDOM" in err

    def test_weights_and_labels(self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path) -> None:
        torch.manual_seed(5)
        model = effkernels.create_model("efficientnet_b0", num_classes=3)
        with torch.no_grad():
            model.classifier.bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        (tmp_path / "labels.txt").write_text("apple\npear\nplum\n")
        status, out, err = run(
            capsys, "predict", album / "coffee.jpg", *self.small, "--topk", "2",
            "--weights", tmp_path / "weights.pth", "--labels", tmp_path / "labels.txt",
        )  # fmt: skip
        assert status == 0
        assert "WARNING" not in err
        assert "coffee.jpg" in out
        assert "pear" in out.splitlines()[3]

    def test_wrong_number_of_labels(self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path) -> None:
        (tmp_path / "labels.txt").write_text("apple\npear\n")
        status, _, err = run(capsys, "predict", album, "--labels", tmp_path / "labels.txt")
        assert status == 2
        assert "2 lines for a model of 1000 classes" in err

    def test_weights_without_a_classifier(
        self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path
    ) -> None:
        torch.save(effkernels.create_model("efficientnet_b0", num_classes=0).state_dict(), tmp_path / "trunk.pth")
        status, _, err = run(capsys, "predict", album, "--weights", tmp_path / "trunk.pth")
        assert status == 2
        assert "0 classes; needed are 3 channels and at least one class" in err

    def test_weights_of_another_model(self, capsys: pytest.CaptureFixture[str], album: Path, tmp_path: Path) -> None:
        torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pth")
        status, _, err = run(capsys, "predict", album, "--weights", tmp_path / "linear.pth")
        assert status == 2
        assert "linear.pth" in err
        assert "Traceback" not in err

    def test_damaged_file_is_reported_and_the_rest_goes_on(
        self, capsys: pytest.CaptureFixture[str], album: Path
    ) -> None:
        (album / "broken.jpg").write_bytes((album / "coffee.jpg").read_bytes()[:200])
        status, report = run_json(capsys, "predict", album, album / "missing.jpg", *self.small)
        assert status == 1
        assert len(report["predictions"]) == 3
        assert {Path(failure["file"]).name for failure in report["failures"]} == {"broken.jpg", "missing.jpg"}

    def test_empty_folder(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        status, out, err = run(capsys, "predict", tmp_path / "empty", *self.small)
        assert (status, out) == (1, "")
        assert "no images in this folder" in err

    @pytest.mark.parametrize("precision", ["bfloat16", "amp"])
    def test_precision(self, capsys: pytest.CaptureFixture[str], album: Path, precision: str) -> None:
        status, report = run_json(capsys, "predict", album, "--precision", precision, *self.small)
        assert status == 0
        assert len(report["predictions"]) == 3

    def test_without_pillow(
        self, capsys: pytest.CaptureFixture[str], album: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        status, _, err = run(capsys, "predict", album)
        assert status == 2
        assert "pip install 'effkernels[models]'" in err


class TestBench:
    quick = ("--img-size", "64", "--rounds", "2", "--warmup", "1", "--device", "cpu", "--no-memory", "--threads", "1")

    def test_rows(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        status, report = run_json(
            capsys, "bench", "--batch-size", "1", "2", "--contender", "eager", "eager-channels-last",
            "--results-file", file, *self.quick,
        )  # fmt: skip
        assert status == 0
        rows = read_rows(file)
        assert [Row(**row) for row in report["rows"]] == rows
        assert [row.batch for row in rows] == [1, 1, 2, 2]
        assert len({row.date for row in rows}) == 1, "the rows of one run share their date"
        for row in rows:
            assert row.case == "efficientnet_b0@64"
            assert row.device.endswith("1 thread")
            assert 0 < row.median_us <= row.p95_us <= row.p99_us
            assert row.images_per_s == pytest.approx(row.batch / row.median_us * 1e6, rel=1e-3)
            assert row.rel_error is not None
            assert 0 < row.rel_error < 1e-4
            assert row.peak_bytes is None

    def test_names_contenders_that_are_not_installed(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def some(*arguments: object, **options: object) -> tuple[list[object], list[object]]:
            return [], []

        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name))
        monkeypatch.setattr("effkernels.bench.suites.run_case", some)
        _, _, err = run(capsys, "bench", "--contender", "eager", *self.quick)
        assert err.splitlines() == [
            "bench: not compared, because not installed: openvino",
            f"bench: install them: {sys.executable} -m pip install openvino",
            "bench: then compare: --contender eager openvino",
        ]

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = run(capsys, "bench", "--contender", "eager", *self.quick)
        assert status == 0
        assert "bench: efficientnet_b0@64, batch 1: eager (timm): preliminary, one turn alone: " in err
        assert "bench: efficientnet_b0@64, batch 1: eager (timm): median " in err
        title, columns, _, row = out.splitlines()[:4]
        assert title.startswith("efficientnet_b0@64, batch 1, float32")
        assert (
            columns.split()
            == (
                "contender median ms p95 ms p99 ms images/s peak MB rel. error spread x eager"
                + columns.partition("x eager")[2]
            ).split()
        )
        assert row.startswith("eager (")
        assert "eager prepared" in err or "bench:" in err

    def test_contender_that_was_asked_for_and_cannot_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, report = run_json(
            capsys, "bench", "--model", "tf_efficientnet_b0", "--contender", "eager", "torchvision", *self.quick
        )
        assert status == 1
        assert len(report["rows"]) == 1
        assert report["refusals"][0]["contender"] == "torchvision"

    def test_memory_is_measured(self, capsys: pytest.CaptureFixture[str]) -> None:
        quick = [flag for flag in self.quick if flag != "--no-memory"]
        status, report = run_json(capsys, "bench", "--contender", "eager", *quick)
        if not report["rows"][0]["peak_bytes"]:
            assert "peak memory" in report["refusals"][0]["reason"]
            pytest.skip(report["refusals"][0]["reason"])
        assert status == 0
        assert 0 < report["rows"][0]["peak_bytes"] < 1 << 30

    def test_list_of_contenders(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, _ = run(capsys, "bench", "--list-contenders", "--device", "cpu")
        assert status == 0
        assert all(name in out for name in CONTENDERS)
        assert "only for cuda, not cpu" in out


class TestConsole:
    def test_table_without_a_terminal_is_complete(self, capsys: pytest.CaptureFixture[str]) -> None:
        long = "x" * 300
        console.table("title", ["name", "number"], [[long, "1.5"], ["[red]b", "22.5"]])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "title"
        assert lines[3] == f"{long}     1.5"
        assert lines[4].startswith("[red]b")

    def test_empty_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        console.table("title", ["name"], [])
        assert capsys.readouterr().out.splitlines() == ["title", "name", "----"]

    def test_progress_without_a_terminal_is_a_few_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        with console.progress("work", 1000) as advance:
            for step in range(1000):
                advance(f"step {step}")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 10
        assert lines[-1] == "work: 1000/1000 step 999"

    def test_progress_without_a_terminal_shows_slow_steps(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0
        monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
        with console.progress("work", 1000) as advance:
            for seconds in (1.0, 5.0, 1.0, 3.0, 1.0):
                now += seconds
                advance(f"at {now}")
        assert capsys.readouterr().err.splitlines() == ["work: 2/1000 at 6.0", "work: 5/1000 at 11.0"]

    @pytest.mark.skipif(not console.HAVE_RICH, reason="the bar is rich's")
    def test_progress_on_a_terminal_moves(self) -> None:
        code = (
            "import time; from effkernels import console\n"
            "with console.progress('work', 3) as advance:\n"
            "    for step in range(3): time.sleep(0.2); advance(f'step {step}')\n"
        )
        terminal, end = os.openpty()
        environment = {**os.environ, "TERM": "xterm"}
        subprocess.run([sys.executable, "-c", code], stderr=end, check=True, env=environment)
        os.close(end)
        shown = os.read(terminal, 100_000).decode()
        os.close(terminal)
        assert all(f"{done}/3" in shown for done in range(4))

    def test_progress_of_nothing(self) -> None:
        with console.progress("work", 0):
            pass

    def test_works_without_rich(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['rich'] = sys.modules['rich.console'] = None\n"
            "from effkernels.cli import main; sys.exit(main(['bench', '--list-contenders', '--device', 'cpu']))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "eager" in done.stdout


def test_device_default_is_the_gpu_where_there_is_one() -> None:
    assert common.device_of(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(shutil.which("effkernels", path=Path(sys.executable).parent) is None, reason="not installed")
def test_the_installed_command_runs() -> None:
    done = subprocess.run([Path(sys.executable).parent / "effkernels", "--version"], capture_output=True, text=True)
    assert done.stdout == f"effkernels {effkernels.__version__}\n"

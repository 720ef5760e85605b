"""``effkernels explain`` as a user sees it: tables, JSON, exit status, and the messages for wrong arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

import effkernels
from effkernels.cli import main
from effkernels.commands import explain
from effkernels.plan.gpus import GPUS
from effkernels.plan.launches import PRECISIONS, Plan, plan_model
from effkernels.plan.time_estimate import MODES, TERMS

pytestmark = pytest.mark.usefixtures("compiled")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of ``effkernels explain``."""
    try:
        status = main(["explain", *arguments])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


class TestTable:
    def test_last_line_counts_the_launches(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = run(capsys, "efficientnet_b0")
        planned = plan_model("efficientnet_b0")
        assert (status, err) == (0, "")
        assert out.splitlines()[-1] == f"launches: {len(planned.launches)}"

    def test_every_launch_has_a_row_and_the_sums_come_last(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "efficientnet_b0", "--batch-size", "32", "--device", "a100")
        planned = plan_model("efficientnet_b0", batch_size=32, gpu="a100")
        title, columns, _, *rows = out.splitlines()
        assert title.startswith("efficientnet_b0@224, batch 32, bfloat16 on NVIDIA A100")
        for word in ("layer", "kernel", "grid", "block", "shared", "MB", "MFLOP", "special", "floor"):
            assert word in columns
        for launch, row in zip(planned.launches, rows, strict=False):
            layer, kernel, grid, *rest = row.split()
            assert (layer, kernel) == (launch.layer, launch.kernel)
            assert grid.split("/")[0].rstrip("*") == ("-" if launch.grid is None else str(launch.grid))
            assert rest[-1] == launch.limited_by
        name, megabytes, *_, floor = rows[len(planned.launches)].split()
        assert name == "sum"
        assert float(megabytes) == pytest.approx(planned.totals.bytes / 1e6, rel=1e-3)
        assert float(floor) == pytest.approx(planned.totals.floor_us, rel=1e-3)

    def test_every_part_of_the_network_has_a_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "efficientnet_b0")
        rows = [line.split() for line in out.splitlines()]
        for part, sums in plan_model("efficientnet_b0").by_block().items():
            assert [part, str(sums.launches)] in [row[:2] for row in rows]

    def test_says_that_a_floor_is_computed(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "efficientnet_b0")
        assert "computed, not measured" in out
        assert "4800 GB/s" in out

    @pytest.mark.parametrize("model", ["efficientnet_b0", "tf_efficientnet_b7"])
    def test_fits_into_120_columns(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        _, out, _ = run(capsys, model, "--batch-size", "256", "--device", "h100")
        assert max(map(len, out.splitlines())) <= explain.WIDTH

    def test_tf32_can_be_ruled_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ("efficientnet_b0", "--precision", "float32")
        allowed, exact = (" ".join(run(capsys, *flags, *more)[1].split()) for more in ((), ("--no-tf32",)))
        assert "494.7 (TF32) TFLOP/s in tensor cores" in allowed
        assert "TF32" not in exact


class TestModelTime:
    def test_every_launch_has_a_row_with_its_longest_term_marked(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, out, err = run(capsys, "efficientnet_b0", "--batch-size", "256", "--device", "h100", "--model-time")
        assert (status, err) == (0, "")
        planned = plan_model("efficientnet_b0", batch_size=256, gpu="h100")
        title, columns, _, *rows = out.splitlines()
        assert title == "efficientnet_b0@224, batch 256, bfloat16 on NVIDIA H100 SXM5 80GB: an estimate, microseconds"
        names = columns.split()
        for launch, row in zip(planned.launches, rows, strict=False):
            cells = row.split()
            assert cells[:2] == [launch.layer, launch.kernel]
            terms = dict(zip(TERMS, cells[5:-1], strict=True))
            assert [term for term, cell in terms.items() if cell.endswith("*")] == [launch.time.longest]
            assert float(cells[-1]) == pytest.approx(launch.time.us, abs=0.5)
        assert len(names) == 5 + len(TERMS) + 1
        name, megabytes, *_, whole = rows[len(planned.launches)].split()
        assert name == "sum"
        assert float(megabytes) == pytest.approx(planned.totals.bytes / 1e6, abs=0.5)
        assert float(whole) == pytest.approx(sum(launch.time.us for launch in planned.launches), abs=0.5)

    def test_last_lines_are_sums_in_every_mode(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "efficientnet_b0", "--model-time")
        planned = plan_model("efficientnet_b0")
        expected = [f"estimated, {mode}: {planned.estimated_us(mode):.1f} us" for mode in MODES]
        assert out.splitlines()[-len(MODES) :] == expected

    def test_is_called_an_estimate(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "efficientnet_b0", "--model-time")
        assert "An estimate: computed" in out
        assert "not measured" in out

    @pytest.mark.parametrize("batch", ["1", "256"])
    def test_fits_into_120_columns(self, capsys: pytest.CaptureFixture[str], batch: str) -> None:
        _, out, _ = run(capsys, "efficientnet_b0", "--batch-size", batch, "--model-time")
        assert max(map(len, out.splitlines())) <= explain.WIDTH

    def test_json_holds_it_with_and_without_the_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ("efficientnet_b0", "--json")
        plain, timed = (run(capsys, *flags, *more)[1] for more in ((), ("--model-time",)))
        assert plain == timed
        report = json.loads(timed)
        assert report["estimated_us"].keys() == set(MODES)
        for launch in report["launches"]:
            assert launch["time"].keys() >= {*TERMS, "us", "longest", "blocks", "counted"}


class TestJson:
    @pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
    def test_is_the_plan(self, capsys: pytest.CaptureFixture[str], gpu: str) -> None:
        flags = ("--batch-size", "3", "--img-size", "160", "--precision", "float16", "--device", gpu.upper())
        status, out, _ = run(capsys, "efficientnet_b1", *flags, "--json")
        assert status == 0
        expected = plan_model("efficientnet_b1", gpu=gpu, batch_size=3, img_size=160, precision="float16")
        assert Plan.from_json(out) == expected

    def test_has_what_a_reader_needs(self, capsys: pytest.CaptureFixture[str]) -> None:
        report: dict[str, Any] = json.loads(run(capsys, "efficientnet_b0", "--json")[1])
        assert report["totals"]["launches"] == len(report["launches"])
        for launch in report["launches"]:
            assert launch.keys() >= {
                "layer", "op", "kernel", "grid", "block", "shared_bytes", "bytes", "flops", "special_functions",
                "floor_us", "limited_by",
            }  # fmt: skip


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "MODEL"),
            (["efficientnet_b9"], "unknown model 'efficientnet_b9': did you mean"),
            (["resnet50"], "known are efficientnet_b0"),
            (["efficientnet_b0", "--device", "v100"], f"allowed: {', '.join(gpu.name for gpu in GPUS)}"),
            (["efficientnet_b0", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
            (["efficientnet_b0", "--img-size", "big"], "'big' is not a whole number"),
            (["efficientnet_b0", "--precision", "int8"], "int8"),
        ],
    )
    def test_wrong_ones(self, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str) -> None:
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert message in err

    @pytest.mark.parametrize("model", effkernels.list_models())
    def test_every_model(self, capsys: pytest.CaptureFixture[str], model: str) -> None:
        status, out, _ = run(capsys, model, "--json")
        assert status == 0
        assert json.loads(out)["model"] == model

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_every_precision(self, capsys: pytest.CaptureFixture[str], precision: str) -> None:
        status, out, _ = run(capsys, "efficientnet_b0", "--precision", precision)
        assert status == 0
        assert f", {precision} on " in out

    def test_without_the_library(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("effkernels._library.is_loaded", lambda: False)
        monkeypatch.setattr("effkernels._library.load_error", lambda: "libeffkernels.so: no such file")
        status, out, err = run(capsys, "efficientnet_b0")
        assert (status, out) == (2, "")
        assert "needs the compiled library" in err
        assert "no such file" in err

    def test_a_forced_backend_changes_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        free = run(capsys, "efficientnet_b0")
        with effkernels.backend("reference"):
            assert run(capsys, "efficientnet_b0") == free


def test_runs_from_the_shell_and_twice_alike() -> None:
    command = [sys.executable, "-m", "effkernels", "explain", "efficientnet_b0", "--json"]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert Plan.from_json(first.stdout) == plan_model("efficientnet_b0")

"""`effkernels scale` as a user sees it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from effkernels.cli import main
from effkernels.scaling.families import MOBILENET_V1, build_sequential
from effkernels.scaling.files import load_network, save_network
from effkernels.scaling.network import Rounding, Stage, StagedNetwork, scale

SMALL = StagedNetwork(
    "small",
    16,
    (
        Stage("conv", 1, 8, 2, options={"activation": "relu"}, deepens=False),
        Stage("depthwise_separable", 2, 16, 2),
    ),
    build_sequential,
)


@pytest.fixture
def small(tmp_path: Path) -> str:
    save_network(SMALL, tmp_path / "small.json")
    return str(tmp_path / "small.json")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output, standard error of ``effkernels scale``."""
    try:
        status = main(["scale", *map(str, arguments)])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    output = capsys.readouterr()
    return status, output.out, output.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    status, out, err = run(capsys, *arguments, "--format", "json")
    assert status == 0, err
    return json.loads(out)


def test_a_network_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--network", "mobilenet_v1")
    assert status == 0
    assert "MobileNetV1 at 224: its stages" in out
    assert "depthwise + 1x1, k3x3" in out
    assert f"{MOBILENET_V1.cost().multiply_adds / 1e9:.3f}" in out


@pytest.mark.parametrize(
    ("flags", "scaled"),
    [
        (("--phi", "2"), scale(SMALL, 2)),
        (("--depth", "1.4", "--width", "2", "--resolution", "1.3"), scale(SMALL, depth=1.4, width=2, resolution=1.3)),
        (
            ("--width", "1.3", "--divisor", "4", "--resolution", "1.2", "--round-resolution", "4"),
            scale(SMALL, width=1.3, resolution=1.2, rounding=Rounding(4, "up", 4)),
        ),
        (("--depth", "1.3", "--round-depth", "down"), scale(SMALL, depth=1.3, rounding=Rounding(depth="down"))),
    ],
)
def test_scaled_beside_its_baseline(
    capsys: pytest.CaptureFixture[str], small: str, flags: tuple[str, ...], scaled: StagedNetwork
) -> None:
    stages, costs = run_json(capsys, "--network", small, *flags)
    assert [row["channels"] for row in stages["rows"]] == [stage.channels for stage in SMALL.stages]
    assert [row["scaled_channels"] for row in stages["rows"]] == [stage.channels for stage in scaled.stages]
    assert [row["scaled_layers"] for row in stages["rows"]] == [stage.layers for stage in scaled.stages]
    assert [row["gflops"] for row in costs["rows"]] == [n.cost().multiply_adds / 1e9 for n in (SMALL, scaled)]
    assert costs["rows"][1]["resolution"] == scaled.resolution


def test_within_a_budget_and_saved(capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path) -> None:
    budget = 4 * SMALL.cost().multiply_adds
    file = tmp_path / "large.json"
    status, _, err = run(capsys, "--network", small, "--budget-multiply-adds", str(budget), "--save", file)
    assert status == 0
    assert "phi=" in err
    assert "the next larger network exceeds multiply_adds" in err
    assert budget / 2 < load_network(file).cost().multiply_adds <= budget


def test_files_hold_what_is_printed(capsys: pytest.CaptureFixture[str], small: str, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    flags = ("--network", small, "--table", "growth", "--growth-phi", "1")
    runs = tmp_path / "runs.jsonl"
    runs.write_text('{"name": "small", "accuracy": 0.8}\n{"name": "compound phi=1", "accuracy": 0.9}\n')
    table = run_json(capsys, *flags, "--output", folder, "--png", "--accuracy", runs)
    assert sorted(file.name for file in folder.iterdir()) == ["growth.csv", "growth.json", "growth.md", "growth.png"]
    assert json.loads((folder / "growth.json").read_text()) == table
    with (folder / "growth.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gflops"]) for row in rows] == [row["gflops"] for row in table["rows"]]
    _, out, _ = run(capsys, *flags, "--format", "markdown")
    assert (folder / "growth.md").read_text() == out
    height, width, _ = matplotlib.image.imread(folder / "growth.png").shape
    assert width > 2.5 * height  # three panels


def test_stages_of_a_scaled_network(capsys: pytest.CaptureFixture[str], small: str) -> None:
    table = run_json(capsys, "--network", small, "--table", "stages", "--depth", "2")
    assert [row["layers"] for row in table["rows"]] == [1, 4]


def test_equation_3_with_other_coefficients(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--table", "equation3", "--alpha", "1.5", "--format", "csv")
    assert status == 0
    assert float(list(csv.DictReader(out.splitlines()))[2]["depth"]) == pytest.approx(1.5**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--network", "resnet"), "network 'resnet' is not known; allowed: efficientnet_b0, mobilenet_v1"),
        (("--phi", "1", "--depth", "2"), "phi alone, or factors alone"),
        (("--phi", "1", "--budget-multiply-adds", "1e9"), "a budget is not allowed with --phi"),
        (("--budget-multiply-adds", "-1"), "multiply_adds=-1.0; allowed: above 0"),
        (("--alpha", "0.5"), "alpha=0.5 must be finite and at least 1"),
        (("--divisor", "0"), "divisor=0; allowed: 1 or more"),
        (("--table", "pie"), "invalid choice: 'pie'"),
        (("--png",), "--png needs --output DIR"),
        (("--accuracy", "x.csv"), "--accuracy needs --table growth --png"),
        (("--table", "stages", "--save", "x.json"), "--save needs a scaled network"),
        (("--network", "torchvision:resnet18", "--save", "x.json"), "is built by another library"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in err

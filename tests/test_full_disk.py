"""Every command that writes, on a disk that is full: the result is said, the old file stays, no half one is left.

The export has its own tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from full_disk import small_disk

import effkernels
from effkernels.bench import timing
from effkernels.cli import main
from effkernels.scaling.journal import Journal
from effkernels.triton import tuned_plan
from effkernels.triton.tuned_plan import Configuration, ConfigurationKey, TunedPlan

CAM = ["cam", "--example", "--img-size", "64"]
SEARCH = ["search", "--network", "search_evaluations:TINY", "--evaluate", "search_evaluations:wide_is_good",
          "--grid", "0.25", "--tolerance", "0.15", "--divisor", "2", "--workers", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("given") / "b0.pth"
    torch.save(effkernels.create_model("efficientnet_b0", num_classes=3).state_dict(), file)
    return file


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.mark.parametrize(
    ("arguments", "name", "says"),
    [
        (["convert", "WEIGHTS", "--to", "torchvision", "--force", "--output", "OUT"], "new.pth", ""),
        (["convert", "WEIGHTS", "--to", "torchvision", "--force", "--output", "OUT"], "new.safetensors", ""),
        ([*CAM, "--weights", "WEIGHTS", "--force", "--output", "OUT"], "map.png", "peak"),
        (["scale", "--network", "efficientnet_b0", "--phi", "1", "--force", "--save", "OUT"], "b1.json", "GFLOPs"),
        (["scale", "--table", "equation3", "--output", "FOLDER"], "equation3.md", "Equation 3"),
        ([*SEARCH, "--force", "--save", "OUT"], "best.json", "alpha"),
        ([*SEARCH, "--force", "--plot", "OUT"], "plot.png", "alpha"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_the_old_file_stays_and_the_result_is_said(
    arguments: list[str], name: str, says: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "out" / name
    old.parent.mkdir()
    old.write_text("old")
    words = {"WEIGHTS": str(checkpoint), "OUT": str(old), "FOLDER": str(old.parent)}
    with small_disk(300):
        status = status_of([words.get(word, word) for word in arguments])
    output = capsys.readouterr()
    assert status in (1, 2)
    assert "File too large" in output.err or "could not be written" in output.err
    assert str(old.name) in output.err.splitlines()[-1] or str(old.parent) in output.err.splitlines()[-1]
    assert says.lower() in output.out.lower()
    assert [file.name for file in old.parent.iterdir()] == [name]
    assert old.read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cam", "--example", "--output", "missing/map.png"], "there is no folder missing"),
        (["cam", "--example", "--output", "there.png"], "there.png exists; --force overwrites it"),
        ([*SEARCH, "--save", "missing/best.json"], "there is no folder missing"),
        ([*SEARCH, "--save", "best.txt"], "the name must end in one of .json"),
        ([*SEARCH, "--save", "there.json"], "there.json exists; --force overwrites it"),
        ([*SEARCH, "--plot", "missing/plot.png"], "there is no folder missing"),
        ([*SEARCH, "--plot", "there.png"], "there.png exists; --force overwrites it"),
        ([*SEARCH, "--plot", "a" * 300 + ".png"], "File name too long"),
        (["scale", "--phi", "1", "--save", "missing/b1.json"], "there is no folder missing"),
        (["scale", "--phi", "1", "--save", "there.json"], "there.json exists; --force overwrites it"),
        (["bench", "--results-file", "folder"], "--results-file folder: "),
        (["bench", "--results-file", "there.png/rows.jsonl"], "--results-file there.png/rows.jsonl: "),
    ],
)
def test_outputs_are_checked_before_the_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("there.png", "there.json"):
        (tmp_path / name).write_text("old")
    assert status_of(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""
    assert {file.name for file in tmp_path.iterdir()} == {"folder", "there.png", "there.json"}
    assert (tmp_path / "there.png").read_text() == "old"


@pytest.mark.parametrize("command", [["info"], ["scale", "--table", "equation3"]])
def test_full_standard_output_is_reported(command: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "effkernels", *command], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == [f"effkernels {command[0]}: standard output: No space left on device"]


def test_rows_that_are_measured_are_printed_though_they_cannot_be_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    with small_disk(10):
        status = main(
            ["bench", "--results-file", str(file), "--img-size", "32", "--rounds", "1", "--warmup", "1", "--no-memory",
             "--contender", "effkernels", "--threads", "1", "--json"]
        )  # fmt: skip
    output = capsys.readouterr()
    assert status == 1
    assert json.loads(output.out)["rows"][0]["contender"].startswith("effkernels")
    assert f"--results-file {file}: File too large" in output.err
    assert file.read_text() == "{}\n"
    assert timing.append_rows(file, []) is None


def test_a_journal_keeps_whole_lines(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal", {"a": 1}) as journal:
        journal.add("trial", "one", {"x": 1})
        with small_disk(150), pytest.raises(OSError, match="File too large"):
            journal.add("trial", "two", {"x": "y" * 1000})
        journal.add("trial", "three", {"x": 3})
    with Journal(tmp_path / "journal", {"a": 1}) as journal:
        assert journal.get("trial", "one") == {"x": 1}
        assert journal.get("trial", "two") is None
        assert journal.get("trial", "three") == {"x": 3}


def test_a_tuned_plan_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned_plan.VARIABLE, str(tmp_path))
    plan = TunedPlan("NVIDIA H200")
    plan.configurations[ConfigurationKey("conv_bn_act", "bfloat16", (4, 3))] = Configuration((1, 2), 5.0, 4.0)
    before = tuned_plan.record(plan).read_text()
    with small_disk(100), pytest.raises(OSError, match="File too large"):
        tuned_plan.record(plan)
    assert tuned_plan.file_of("NVIDIA H200").read_text() == before
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]

"""docs/train-command.md from top to bottom: every command is run, on a small network and for fewer epochs."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from training_runs import MODEL, NAME, log_of, make_folder, status_of

from effkernels.commands import train as command
from effkernels.models import registry
from effkernels.models.peers import import_torchvision
from effkernels.train.training import FILES

import_torchvision()

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "train-command.md").read_text()
LINES = [
    line for block in re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]
COMMANDS = [shlex.split(line) for line in LINES if line.startswith("effkernels ")]
# What a reader runs for minutes runs for seconds here; the last of two flags counts.
SMALL = ["--model", NAME, "--img-size", "32", "--device", "cpu"]
SHORT = ["--epochs", "2", "--batch-size", "16", "--workers", "0"]


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(registry._MODELS, NAME, MODEL)
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "photos" / "train", 12)
    make_folder(tmp_path / "photos" / "val", 4)
    assert len(COMMANDS) == 5
    for _, *arguments in COMMANDS:
        if arguments[0] == "predict":
            arguments += SMALL
        elif "--resume" not in arguments:
            arguments += [*SMALL, *SHORT]
        status = status_of(arguments)
        output = capsys.readouterr()
        assert status == 0, f"{arguments}\n{output.err}"
        assert output.out.strip()
    for folder in ("digits", "run", "tuned"):
        assert {file.name for file in Path(folder).iterdir()} == set(FILES)
        assert len(log_of(Path(folder))) == 2
        assert all(f"`{name}`" in PAGE for record in log_of(Path(folder)) for name in record)


def test_the_page_names_what_there_is() -> None:
    assert all(f"`{name}`" in PAGE for name in FILES)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = {option for action in parser._actions for option in action.option_strings}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--no-build-isolation", "--nproc-per-node", "--labels"}
    assert named <= flags
    torchrun = next(line for line in LINES if line.startswith("torchrun "))
    parser.parse_args(shlex.split(torchrun.partition(" train ")[2]))

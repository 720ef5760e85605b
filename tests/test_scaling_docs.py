"""docs/scaling.md from top to bottom: every file, every command and every block of Python is run, with fewer epochs
and fewer digits.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effkernels.cli import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)

# What a reader runs for minutes runs for seconds here.
SHORTER = {
    "--grid 0.2 --tolerance 0.05": "--grid 0.5 --tolerance 0.05",
    "--trials 40 --epochs 12": "--trials 1 --epochs 1",
    "--compare --epochs 10": "--compare --epochs 1",
}
FILES = (
    "search.png",
    "figures/growth.png",
    "figures/variants.png",
    "found-larger.json",
    "digits.png",
    "photograph.png",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setattr("effkernels.cam.digits._TRAINED_ON", 250)  # of 1,500: five networks train for the figure
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_the_page_holds_blocks_of_every_kind() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    assert all(any(short in code for _, code in BLOCKS) for short in SHORTER)


@pytest.mark.slow
def test_the_tutorial_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for language, code in BLOCKS:
        named = re.match(r"# (\w+\.py)\n", code)
        if named is not None:
            (folder / named[1]).write_text(code)
        elif language == "python":
            names: dict[str, Any] = {"__name__": "tutorial"}
            exec(compile(code, "docs/scaling.md", "exec"), names)
        else:
            for line in code.splitlines():
                for long, short in SHORTER.items():
                    line = line.replace(long, short)
                program, *arguments = shlex.split(line)
                assert program == "effkernels", line
                status = main(arguments)
                output = capsys.readouterr()
                assert status == 0, f"{line}\n{output.err}"
                assert output.out.strip(), f"{line} prints nothing"
    for name in FILES:
        assert (folder / name).stat().st_size > 0, name

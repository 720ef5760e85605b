"""Writes the output of the commands shown in README.md and docs/: ``python -m benchmarks.console_examples``.

A command is a line that starts with ``$ `` in a block marked ``console``; what follows up to the next one is its output
on standard output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.report import README

PAGES = (README, *sorted((README.parent / "docs").glob("*.md")))
_BLOCK = re.compile(r"(?<=```console\n).*?(?=```)", re.DOTALL)


def commands(page: str) -> list[str]:
    """Return the commands that the text of a page shows, in order."""
    lines = [line for block in _BLOCK.findall(page) for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def output_of(command: str, folder: Path) -> str:
    """Standard output of a command, run in a folder with this interpreter's programs first on the path.

    Raises:
        RuntimeError: the command failed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # pipefail: a command that fails ahead of a `tail` has failed.
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def with_outputs(page: str, folder: Path) -> str:
    """Return the text of a page with the output of each command that it shows, run now."""

    def run(block: re.Match[str]) -> str:
        return "".join(
            f"$ {command}\n{output_of(command, folder)}" for command in commands(f"```console\n{block[0]}```")
        )

    return _BLOCK.sub(run, page)


def main() -> int:
    """Rewrite the pages that show commands."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if commands(text):
            page.write_text(with_outputs(text, README.parent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The progress so far: a file of one JSON object a line, from which a later call continues.

A part writes each step as it begins and ends, the runner writes how each part ended. Nothing is kept in memory alone,
so that a part that is killed has said how far it came.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A step that began so often and never ended is not tried again: it hangs, or takes the process with it.
MOST_TRIES = 3
_SECONDS_BETWEEN_COPIES = 1.0
_SOURCES = ("csrc", "effkernels", "benchmarks", "tests")
_SOURCE_ENDINGS = {".py", ".cu", ".cuh", ".h", ".cpp"}


@dataclass
class PartProgress:
    """One part.

    Attributes:
        planned: the names of its steps, in order; empty until it has made its plan.
        begun: how often each step was begun.
        cut_after: steps that were cut, and the seconds that they had: they need more.
        done: what is wrong with each step that came to its end; "" where nothing is.
        under_way: the step that began last and has not ended.
        result, seconds, note: how its last turn ended; "" before that.
    """

    planned: list[str] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)
    cut_after: dict[str, float] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)
    under_way: str = ""
    result: str = ""
    seconds: float = 0.0
    note: str = ""

    @property
    def given_up(self) -> list[str]:
        """Steps that never end."""
        return [name for name in self.planned if name not in self.done and self.begun.get(name, 0) >= MOST_TRIES]

    @property
    def wrong(self) -> list[str]:
        """Return what is wrong, a line for each step."""
        found = [self.done[name] for name in self.planned if self.done.get(name)]
        return found + [f"{name}: began {MOST_TRIES} times and never came to its end" for name in self.given_up]

    @property
    def left(self) -> list[str]:
        """Steps that are still to do."""
        given_up = set(self.given_up)
        return [name for name in self.planned if name not in self.done and name not in given_up]

    @property
    def finished(self) -> bool:
        """Return whether another turn would find nothing to do."""
        if self.result == "failed":
            return bool(self.planned) and not self.left
        return self.result in ("passed", "not available")

    def how_far(self) -> str:
        """Return how far the part came, in words."""
        if not self.planned:
            return "before its first step"
        done = sum(name in self.done for name in self.planned)
        text = f"{done} of {len(self.planned)} steps"
        if self.under_way:
            return f"{text}, then in {self.under_way}"
        return f"{text}, next {self.left[0]}" if self.left else text


class Progress:
    """The file. Without one, everything is forgotten when the process ends."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._copied = 0.0

    def begin(self, run: str) -> bool:
        """Start a run, or continue it: True if the file is of the same run.

        Args:
            run: what must be equal for steps to count: source, device, sizes.
        """
        if self._lines()[:1] == [{"run": run}]:
            return True
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
        return False

    def forget(self) -> None:
        """Start from nothing next time."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def note(self, part: str, **what: Any) -> None:
        """Write down one thing about a part, see `PartProgress`."""
        if self.file is None:
            return
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"part": part, **what}) + "\n")
        if time.monotonic() - self._copied > _SECONDS_BETWEEN_COPIES:
            copy_out(self.file)
            self._copied = time.monotonic()

    def of(self, part: str) -> PartProgress:
        """Return what is known about a part."""
        found = PartProgress()
        had = 0.0
        for line in self._lines():
            if line.get("part") != part:
                continue
            if "planned" in line:
                found.planned = line["planned"]
                found.under_way = ""
            if "begun" in line:
                found.under_way = line["begun"]
                found.begun[found.under_way] = found.begun.get(found.under_way, 0) + 1
                had = line.get("left", 0.0)
            if "done" in line:
                found.done[line["done"]] = line["wrong"]
                found.under_way = ""
            if "result" in line:
                found.result, found.seconds, found.note = line["result"], line["seconds"], line["note"]
                if found.result == "cut" and found.under_way:
                    found.cut_after[found.under_way] = had
        return found

    def _lines(self) -> list[dict[str, Any]]:
        if self.file is None or not self.file.is_file():
            return []
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the last one of a process that was killed
                continue
        return found


def run_key(root: Path, words: Sequence[str]) -> str:
    """The name of a run: of the sources under ``root`` by their content, git or not, and of what else decides."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in _SOURCE_ENDINGS and file.is_file():
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes() + b"\0")
    return " ".join([digest.hexdigest()[:16], *words])


def copy_out(*files: Path) -> None:
    """Copy what a reader wants to the folder named by the environment variable OUT, if there is one."""
    out = os.environ.get("OUT")
    if not out:
        return
    for file in files:
        if file.is_file() and file.parent != Path(out):
            shutil.copy(file, out)

"""The files for the rows of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check.common import WORK, Options
from benchmarks.gpu_check.progress import copy_out
from effkernels import environment
from effkernels.bench import timing
from effkernels.bench.timing import Row


class Results:
    """The results file of a device. A smoke test's rows stay out of the results folder.

    Attributes:
        device_name: as rows name it.
        date: of the rows of this run, which are compared with each other.
    """

    def __init__(self, options: Options) -> None:
        self.device_name = environment.device_name(torch.device(options.device), torch.get_num_threads())
        folder = WORK / "results" if options.smoke else options.results
        self.file: Path = folder / f"{environment.file_stem(self.device_name)}.jsonl"
        self.date = ""
        self.restart()

    def restart(self) -> None:
        """Begin another run: its rows are not compared with those of the one before."""
        before = self.date
        while self.date == before:  # it is to the second
            self.date = timing.run_date()
            time.sleep(0.0 if self.date != before else 0.1)

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows down at once, so that a part that is cut keeps what it measured."""
        timing.append_rows(self.file, rows)
        copy_out(self.file)

"""Where the rows of a run go."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu_check.common import WORK, Options
from effkernels import benchmark, environment


def results_file(options: Options) -> tuple[str, Path, str]:
    """Device name, results file and date stamp of a run; a smoke test's rows stay out of the results folder."""
    name = environment.device_name(torch.device(options.device), torch.get_num_threads())
    folder = WORK / "results" if options.smoke else options.results
    return name, folder / f"{environment.file_stem(name)}.jsonl", benchmark.run_date()

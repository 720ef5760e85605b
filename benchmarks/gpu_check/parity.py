"""Part `parity`: the tests that run over every backend, with the CUDA kernels on the device."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.tests import FILES, run_tests

PROCESSES = 8  # the yardsticks are float64 on the CPU in part, and each test's kernels are small
# Of the smoke test: pytest collects all of a file, and this one has few tests; of these, the means of one plane.
SMOKE, SMOKE_PLANE = "tests/test_ops_pooled_means.py", "61"


def parity(options: Options) -> str:
    """Check every operator, block and network on the device against float64; on a CPU by its own kernels."""
    if options.device == "cuda":
        return run_tests(options, "parity", *FILES, "-k", "cuda and not emulated", processes=PROCESSES)
    chosen = [SMOKE, "-k", f"{SMOKE_PLANE} and cpu-plain"] if options.smoke else [FILES[0], "-k", "cpu"]
    return run_tests(options, "parity", *chosen)


if __name__ == "__main__":
    sys.exit(run_part(parity))

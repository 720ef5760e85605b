"""Part `parity`: the tests that run over every backend, with the CUDA kernels on the device."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.tests import FILES, run_tests

PROCESSES = 8  # the yardsticks are float64 on the CPU in part, and each test's kernels are small


def parity(options: Options) -> str:
    """Check every operator, block and network on the device against float64; on a CPU by its own kernels."""
    if options.device == "cuda":
        return run_tests(options, "parity", *FILES, "-k", "cuda and not emulated", processes=PROCESSES)
    wanted = "test_squeeze_excite and cpu and bfloat16 and plain" if options.smoke else "cpu"
    return run_tests(options, "parity", FILES[0], "-k", wanted)


if __name__ == "__main__":
    sys.exit(run_part(parity))

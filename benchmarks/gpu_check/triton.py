"""Part `triton`: the tests that run over every backend, with the Triton kernels on the device.

Triton compiles a kernel for nearly every test: the first seconds show few of them.
"""

from __future__ import annotations

import importlib.util
import sys

from benchmarks.gpu_check.common import NotAvailable, Options, run_part
from benchmarks.gpu_check.parity import PROCESSES, SMOKE, SMOKE_PLANE
from benchmarks.gpu_check.tests import FILES, run_tests


def triton(options: Options) -> str:
    """Every operator, block and network by Triton against float64; in a dry run one operator by its interpreter."""
    options.needs_gpu()
    if importlib.util.find_spec("triton") is None:
        raise NotAvailable(f"{sys.executable} has no triton")
    if not options.dry:
        return run_tests(options, "triton", *FILES, "-k", "triton", processes=PROCESSES)
    chosen = [SMOKE, "-m", "interpreted", "-k", SMOKE_PLANE]
    return run_tests(options, "triton", *chosen, variables={"EFFKERNELS_TEST_FLAVOUR": "triton"})


if __name__ == "__main__":
    sys.exit(run_part(triton))

"""Part `wrappers`: tests/gpu. One golden test per PTX wrapper, streams, CUDA graphs, a second device, limits."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.tests import run_tests


def wrappers(options: Options) -> str:
    """Return the tests that only a GPU can run; in a dry run a wrapper on the emulator."""
    options.needs_gpu()
    only = ["-k", "test_tanh_approx and emulated"] if options.dry else []
    return run_tests(options, "wrappers", "tests/gpu", *only)


if __name__ == "__main__":
    sys.exit(run_part(wrappers))

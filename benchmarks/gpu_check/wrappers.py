"""Part `wrappers`: tests/gpu. One golden test per PTX wrapper, streams, CUDA graphs, a second device, limits."""

from __future__ import annotations

import sys

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.parity import run_pytest


def wrappers(options: Options) -> str:
    """The tests that only a GPU can run."""
    return run_pytest("tests/gpu")


if __name__ == "__main__":
    sys.exit(run_part(wrappers))

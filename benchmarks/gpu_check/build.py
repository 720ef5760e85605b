"""Part `build`: the library exists, loads, and holds code for this GPU; otherwise it is built in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu_check.common import ROOT, NotAvailable, Options, environment, python, run_part
from benchmarks.kernel_economy.reading import ToolMissing, find_tool

# In a process of its own: a library that was loaded before it was built anew stays the old one.
_ASK = """
import json, sys, torch
from effkernels import _library
from effkernels.ops import backends
missing = [op for op in backends.OPERATORS if not backends.can_run_cuda(op, device="meta", dtype=torch.float32).ok]
there = torch.cuda.is_available()
unfit = there and _library.cuda_problem(torch.cuda.get_device_capability(), torch._C._cuda_getDriverVersion())
print(json.dumps([_library.load_error() or "", unfit or "", missing]))
"""


def problem() -> str:
    """Return what is wrong with the library as it is now, in one line; "" if nothing is."""
    done = subprocess.run(python("-c", _ASK), capture_output=True, text=True, env=environment(), cwd=ROOT)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["the package does not import"])[-1]
    load_error, unfit, missing = json.loads(done.stdout.splitlines()[-1])
    if load_error or unfit:
        return str(load_error or unfit)
    return f"the library has no CUDA kernel of {', '.join(missing)}" if missing else ""


def build(options: Options) -> str:
    """Load the library, or build it."""
    import torch

    capability = None
    if options.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    wrong = problem()
    if not wrong:
        return "the library that is there"
    print(f"building: {wrong}", flush=True)
    if capability is None:
        raise AssertionError(wrong)
    try:
        nvcc = find_tool("nvcc")
    except ToolMissing as missing:
        raise NotAvailable(f"{wrong}; and {missing}") from missing
    there = {**environment(), "EFFKERNELS_CUDA": "on", "EFFKERNELS_CUDA_ARCHS": str(capability)}
    there["PATH"] = f"{os.path.dirname(nvcc)}{os.pathsep}{there.get('PATH', '')}"
    done = subprocess.run(python("setup.py", "-q", "build_ext", "--inplace"), env=there, cwd=ROOT)
    assert done.returncode == 0, f"setup.py build_ext failed with exit status {done.returncode}"
    still = problem()
    assert not still, f"built, but {still}"
    return f"built here for sm_{capability}"


if __name__ == "__main__":
    sys.exit(run_part(build))

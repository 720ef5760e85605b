"""Part `build`: the library is there, loads, and holds code for this GPU; where it does not, it is built in place."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu_check.common import ROOT, NotAvailable, Options, environment, python, run_part
from benchmarks.kernel_economy.reading import ToolMissing, find_tool

# In a process of its own: a library that was loaded before it was built anew stays the old one.
_ASK = """
import json, torch
from effkernels import _library, backends
missing = [op for op in backends.OPERATORS if not backends.can_run_cuda(op, device="meta", dtype=torch.float32).ok]
print(json.dumps([_library.load_error(), _library.build_info().get("cuda_archs", []), missing]))
"""


def runs_on(archs: list[str], capability: int) -> bool:
    """Whether code built for ``archs`` ("90-real", "90-virtual") runs on a GPU of a capability (90 for 9.0).

    Machine code runs on every later minor version of its major one; PTX on everything later.
    """
    for arch in archs:
        number, _, kind = arch.partition("-")
        if not number.isdigit():
            continue
        built = int(number)
        if built <= capability and (kind == "virtual" or built // 10 == capability // 10):
            return True
    return False


def problem(answer: tuple[str | None, list[str], list[str]], capability: int | None) -> str | None:
    """What is wrong with the library that answered, in one line; None if nothing is."""
    load_error, archs, missing = answer
    if load_error:
        return load_error
    if capability is not None and not runs_on(archs, capability):
        return f"the library is built for {', '.join(archs) or 'no GPU'}, which this GPU (sm_{capability}) cannot run"
    if missing:
        return f"the library has no CUDA kernel of {', '.join(missing)}"
    return None


def ask() -> tuple[str | None, list[str], list[str]]:
    """Load error, architectures and missing CUDA operators of the library as it is now."""
    done = subprocess.run(python("-c", _ASK), capture_output=True, text=True, env=environment(), cwd=ROOT)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or ["the package does not import"])[-1], [], []
    load_error, archs, missing = json.loads(done.stdout.splitlines()[-1])
    return load_error, archs, missing


def build(options: Options) -> str:
    """Load the library, or build it."""
    import torch

    capability = None
    if options.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    wrong = problem(ask(), capability)
    if wrong is None:
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
    still = problem(ask(), capability)
    assert still is None, f"built, but {still}"
    return f"built here for sm_{capability}"


if __name__ == "__main__":
    sys.exit(run_part(build))

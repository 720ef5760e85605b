"""Peak memory of one contender, measured in a process of its own.

On a CPU it is the growth of the resident set, in bytes, from "ready" to the highest point of the next few calls:
activations and workspaces, without weights, interpreter and libraries. "Ready" is just before the first call. Where the
first calls compile, it is after them, because the compiler's own memory is not needed to serve; PyTorch gives
activations back to the system, so nothing is hidden by that. Linux only: the high-water mark of the resident set is
reset through /proc/self/clear_refs.

On a GPU it is the most that PyTorch's allocator had handed out at once, weights and CUDA graphs included.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from effkernels.bench.contenders import CONTENDERS, NetworkCase

_CALLS = 3
_TIMEOUT_S = 1800


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return int(match[1]) << 10


def _give_back_free_memory() -> None:
    """Return what malloc holds but nobody uses, so that later use of it shows as growth."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def measure_here(contender: str, case: NetworkCase) -> int:
    """Peak memory of a contender in this process, in bytes; use `peak_memory` for a number that counts."""
    torch.set_num_threads(case.threads)
    ready = CONTENDERS[contender].prepare(case)
    images = ready.convert(case.images(0))
    on_gpu = case.torch_device.type == "cuda"

    def call() -> None:
        for _ in range(_CALLS):
            ready.run(images)

    with torch.inference_mode():
        if ready.compiles:
            call()
        if on_gpu:
            if ready.compiles:
                torch.cuda.reset_peak_memory_stats(case.torch_device)
            call()
            torch.cuda.synchronize(case.torch_device)
            return torch.cuda.max_memory_allocated(case.torch_device)
        _give_back_free_memory()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)


def peak_memory(contender: str, case: NetworkCase) -> int | str:
    """Peak memory of a contender in bytes, measured in a process of its own; or one line why there is none."""
    request = json.dumps({"contender": contender, "case": case.to_dict()})
    command = [sys.executable, "-m", "effkernels.bench.peak_memory", request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"peak memory of {contender}: {error}"
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return f"peak memory of {contender}: {reason[0]}"
    # The answer is the last line: a library may have printed something before it.
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def main() -> None:
    """Entry of the process: the request is a JSON argument, the answer one line of JSON on standard output."""
    request = json.loads(sys.argv[1])
    print(json.dumps({"peak_bytes": measure_here(request["contender"], NetworkCase(**request["case"]))}))


if __name__ == "__main__":
    main()

"""Peak memory of one contender, in inference or in training, measured in a process of its own.

On a CPU it is the growth of the resident set, in bytes, from "ready" to the highest point of the next few calls:
activations and workspaces, and in training gradients, without weights, interpreter and libraries. "Ready" is just
before the first call. Where the first calls compile, it is after them, because the compiler's own memory is not needed
to serve; PyTorch gives activations back to the system, so nothing is hidden by that. Linux only: the high-water mark of
the resident set is reset through /proc/self/clear_refs.

On a GPU it is the most that PyTorch's allocator had handed out at once, weights and CUDA graphs included.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable
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
    with torch.inference_mode():
        return peak_of(lambda: ready.run(images), case.torch_device, compiles=ready.compiles)


def peak_of(run: Callable[[], object], device: torch.device, *, compiles: bool) -> int:
    """Return the peak memory of a few calls in this process, in bytes.

    Args:
        compiles: the first call compiles, and does not count.
    """

    def call() -> None:
        for _ in range(_CALLS):
            run()

    if compiles:
        call()
    if device.type == "cuda":
        if compiles:
            torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def peak_memory(contender: str, case: NetworkCase, *, training: bool = False) -> int | str:
    """Peak memory of a contender in bytes, measured in a process of its own; or one line why there is none.

    Args:
        training: of training steps; then the contender is one of `train_cases.CONTENDERS`.
    """
    request = json.dumps({"contender": contender, "case": case.to_dict(), "training": training})
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
    measure = measure_here
    if request["training"]:
        from effkernels.bench import train_cases  # which imports this module

        measure = train_cases.measure_memory_here
    print(json.dumps({"peak_bytes": measure(request["contender"], NetworkCase(**request["case"]))}))


if __name__ == "__main__":
    main()

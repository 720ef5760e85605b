"""Guards after every tensor: a kernel that writes past its output or reads past its inputs is found.

Outputs: the GNU C library's checking allocator (MALLOC_CHECK_=3) puts a guard byte after each block and aborts the
process that frees a block with a changed one. Inputs: each ends where a page ends, and the next page may not be read.
Both stop a process, so the operators run in processes of their own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

OVERRUN = """
import ctypes, torch
t = torch.empty(1, 7, 3, 3)
ctypes.memset(t.data_ptr() + 4 * t.numel(), 1, 1)
del t
"""

# Slots of memory, each followed by a page without access; a tensor is moved to the end of the next slot.
GUARD = """
import ctypes, itertools, mmap, torch

SLOT = 1 << 20
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def slot():
    start = libc.mmap(None, SLOT + mmap.PAGESIZE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert libc.mprotect(start + SLOT, mmap.PAGESIZE, 0) == 0
    return torch.frombuffer((ctypes.c_char * SLOT).from_address(start), dtype=torch.uint8)

slots = itertools.cycle([slot() for _ in range(16)])  # more than an operator has tensors

def guarded(t):
    if not isinstance(t, torch.Tensor) or t.numel() == 0:
        return t
    flat = next(slots)[-t.numel() * t.element_size():].view(t.dtype)
    return flat.as_strided(t.shape, t.stride(), flat.storage_offset()).copy_(t)
"""

OVERREAD = (
    GUARD
    + """
t = guarded(torch.ones(7))
ctypes.string_at(t.data_ptr() + 4 * t.numel(), 1)
"""
)

OPERATORS = """
import torch, op_cases, effkernels
from conftest import available_backends
from op_cases import Case

runs = 0
for backend in available_backends():
    if backend.name != "cpu":
        continue
    with backend.active(), torch.inference_mode():
        for op in op_cases.ALL_OPS:
            for dtype in op_cases.DTYPES:
                for channels in (*op_cases.ODD_CHANNELS, 3, 15, 17, 31, 33):
                    for height, width in (*op_cases.ODD_PLANES, (5, 3), (2, 17)):
                        for stride in (1, 2):
                            shape = {"channels": channels, "out_channels": channels, "reduced": 1 + channels // 4}
                            case = Case(op, dtype, **shape, height=height, width=width, stride=stride, gated=True)
                            arguments = {name: guarded(a) for name, a in case.draw().items()}
                            op_cases.run(effkernels.ops, case, arguments)
                            runs += 1
print("runs:", runs)
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)


def assert_runs(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    assert int(done.stdout.split("runs:")[1]) > 1000


@pytest.mark.usefixtures("compiled")
def test_no_write_past_the_end_of_an_output() -> None:
    checking = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    overrun = run(OVERRUN, **checking)
    if overrun.returncode == 0:
        pytest.skip(f"this C library has no checking allocator: {overrun.stderr.strip()[:200]}")
    assert "invalid pointer" in overrun.stderr  # one byte too far is found
    assert_runs(run("guarded = lambda t: t\n" + OPERATORS, **checking))


@pytest.mark.usefixtures("compiled")
def test_no_read_past_the_end_of_an_input() -> None:
    assert run(OVERREAD).returncode == -signal.SIGSEGV  # one byte too far is found
    assert_runs(run(GUARD + OPERATORS))

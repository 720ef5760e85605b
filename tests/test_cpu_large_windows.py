"""Sizes far from a network's: right values where the CPU kernels leave their usual way, and bounded memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import op_cases
import pytest
import torch
from op_cases import Case
from parity import assert_parity
from torch import Tensor

from effkernels import _library, ops
from effkernels.ops import reference

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

LONG = {"batch": 1, "channels": 3, "out_channels": 2, "height": 5, "width": 250_000, "kernel": (5, 5), "bias": True}
# Rows of an image that would fill tens of megabytes as float32: taps are read one by one, windows are gathered.
CASES = {
    "long rows": Case("depthwise_bn_act_squeeze", **LONG, padding=(2, 2, 1, 2)),
    "long rows by a stride of 2": Case("depthwise_bn_act_squeeze", **LONG, padding=(2, 2, 1, 2), stride=2),
    "long rows, dilated": Case("depthwise_bn_act", **LONG, padding=(4, 4, 3, 4), dilation=2),
    "long rows expanded": Case(op_cases.EXPAND_OP, **LONG, padding=(2, 2, 2, 2)),
    "long rows convolved": Case("conv_bn_act", **LONG | {"channels": 60, "width": 60_000}, stride=2),
    # Windows larger than the image, whose rows are all held.
    "a large dilation": Case("depthwise_bn_act", height=5, width=6, dilation=40, padding=(40, 40, 40, 41)),
    "a large dilation expanded": Case(op_cases.EXPAND_OP, height=5, width=6, dilation=40, padding=(40, 41, 40, 40)),
    "a kernel taller than the image": Case("conv_bn_act", height=3, width=9, kernel=(11, 2), padding=(6, 5, 1, 0)),
    "a large stride": Case("conv_bn_act", height=9, width=12, stride=7, padding=(3, 2, 1, 2)),
}


@lru_cache(maxsize=1)  # every instruction set is held against the same: see pytest_collection_modifyitems
def drawn(case: Case) -> tuple[dict[str, Any], Sequence[Tensor], Sequence[Tensor]]:
    """Arguments, and the results of plain PyTorch and of float64."""
    arguments = case.draw()
    with op_cases.one_thread():
        return arguments, op_cases.run(reference, case, arguments), op_cases.truth(case, arguments)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case.with_(dtype=dtype), id=f"{name}-{dtype}")
        for dtype in (torch.float32, torch.bfloat16)
        for name, case in CASES.items()
    ],
)
def test_values(case: Case, isa: str) -> None:
    arguments, plain, truth = drawn(case)
    outputs = op_cases.run(ops, case, arguments)
    assert_parity(outputs[0], plain[0], truth[0], str(case))
    for pooled, wanted in zip(outputs[1:], truth[1:], strict=True):
        # By two or three means the rule would judge luck (test_ops_pooled_means.py has enough of them): one rounding.
        torch.testing.assert_close(pooled.double(), wanted, rtol=torch.finfo(case.dtype).eps / 2 + 1e-6, atol=1e-6)


MEMORY = """
import torch
from effkernels import ops

torch.set_num_threads(2)


def held(what="VmRSS"):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what + ":"))


zeros = torch.zeros
calls = {calls}
for call in calls[:1]:
    call()
before = held()
for call in calls:
    call()
    print(held() - before, held("VmHWM") - before)
torch.ops.effkernels.cpu_memory(0)
print(held() - before, 0)
"""
# Small images with absurd windows. In a ring of the window's rows, or in rows as long as the stride, they would take
# gigabytes.
ABSURD = """[
    lambda: ops.depthwise_bn_act(zeros(1, 64, 8, 8), zeros(64, 1, 3, 3), padding=(1, 1, 1, 1)),
    lambda: ops.depthwise_bn_act(zeros(1, 16, 1, 1), zeros(16, 1, 3, 3), dilation=2500, padding=(2500,) * 4),
    lambda: ops.depthwise_bn_act(zeros(1, 16, 1, 1), zeros(16, 1, 13, 13), dilation=10**8, padding=(6 * 10**8,) * 4),
    lambda: ops.expand_depthwise_squeeze(
        zeros(1, 16, 1, 1), zeros(16, 16, 1, 1), zeros(16, 1, 3, 3), dilation=10**8, padding=(10**8,) * 4),
    lambda: ops.conv_bn_act(zeros(1, 3, 4, 4), zeros(8, 3, 3, 3), stride=10**7, padding=(1, 1, 1, 1)),
    lambda: ops.conv_bn_act(zeros(1, 3, 4, 4), zeros(8, 3, 3, 3), stride=2**31 - 1, padding=(2**31 - 1,) * 4),
    lambda: ops.conv_bn_act(zeros(1, 3, 4, 4), zeros(1, 3, 3000, 1), padding=(3000, 0, 0, 0)),
    lambda: ops.depthwise_bn_act(zeros(1, 64, 3, 100_000), zeros(64, 1, 3, 3), padding=(1, 1, 1, 1)),
]"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_absurd_windows_is_bounded_and_given_back() -> None:
    """The last call's tensors take 154 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.replace("{calls}", ABSURD)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *calls, (at_last, _) = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    megabyte = 1 << 20
    for now, most in calls[:-1]:
        assert now < 64 * megabyte
        assert most < 128 * megabyte
    assert calls[-1][1] < 450 * megabyte
    assert at_last < 32 * megabyte

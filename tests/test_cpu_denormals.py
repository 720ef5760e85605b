"""Denormal numbers count as zero inside the CPU kernels, on every thread, in calls and in recordings, and nowhere else.

They are the numbers below the smallest normal float32, 1.2e-38. float16's own subnormal numbers, from 6e-8 on, are
ordinary numbers in float32: they count.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import op_cases
import pytest
import torch
from op_cases import ALL_OPS, Case, flat
from parity import assert_parity
from torch import Tensor

from effkernels import _library, ops
from effkernels.engine.cpu_recording import Recording
from effkernels.ops import reference

pytestmark = [
    pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the mode is set on x86-64 alone"),
]

SMALLEST = torch.finfo(torch.float32).tiny
PARAMETERS = ("weight", "expand_weight", "w_reduce", "w_expand")
LARGE = {"batch": 2, "channels": 40, "out_channels": 72, "height": 14, "width": 14}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_every_other(arguments: dict[str, Any], names: tuple[str, ...], value: float) -> dict[str, Any]:
    """`arguments` with every other element of the named tensors replaced by +-value."""
    changed = dict(arguments)
    for name in names:
        if isinstance(arguments.get(name), Tensor):
            t = arguments[name].clone()
            chosen = torch.arange(t.numel()).reshape(t.shape) % 2 == 0
            t[chosen] = t[chosen].sign() * value
            changed[name] = t
    return changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("names", [PARAMETERS, ("x", "pooled", "residual", "gate")], ids=["weights", "inputs"])
@pytest.mark.parametrize("count", [1, 2])
def test_denormals_count_as_zero(names: tuple[str, ...], op: str, count: int, dtype: torch.dtype, isa: str) -> None:
    """The same bits as with zeros in their place, for one thread and for several."""
    case = Case(op, dtype, **LARGE, gated=True, residual=True, parameters="same")
    given = case.draw()
    with threads(count):
        found = op_cases.run(ops, case, with_every_other(given, names, SMALLEST / 3))
        wanted = op_cases.run(ops, case, with_every_other(given, names, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert wanted[0].abs().max() > 1e-3


@pytest.mark.parametrize("op", ["pointwise_bn_act", "depthwise_bn_act", "conv_bn_act"])
def test_results_below_the_smallest_number_are_zero_or_right(op: str, isa: str) -> None:
    case = Case(op, **LARGE, norm="none", activation="identity")
    given = case.draw()
    given["x"] = given["x"] * 1e-19
    given["weight"] = given["weight"] * 1e-19  # products of normal numbers, about 1e-38
    (y,) = op_cases.run(ops, case, given)
    (truth,) = op_cases.truth(case, given)
    products = given["weight"][0].numel()
    assert ((y.double() - truth).abs() <= products * SMALLEST).all()
    assert (y == 0).any()


@pytest.mark.parametrize("op", ALL_OPS)
def test_subnormal_numbers_of_float16_count(op: str, isa: str) -> None:
    """Weights and inputs of 1e-5, half of them below float16's smallest normal number, by the rule of parity.py."""
    case = Case(op, torch.float16, **LARGE, norm="none", activation="identity", parameters="same")
    given = case.draw()
    for name in ("x", "weight"):
        if op != "squeeze_excite_gate" and name in given:
            given[name] = given[name] * (1e-4 if name == "weight" else 1)
    with op_cases.one_thread():
        same_dtype = op_cases.run(reference, case, given)
    for y, theirs, truth in zip(op_cases.run(ops, case, given), same_dtype, op_cases.truth(case, given), strict=True):
        assert_parity(y, theirs, truth)


@pytest.mark.parametrize("flushed", [False, True])
def test_the_threads_keep_their_mode(flushed: bool) -> None:
    """After our kernels, all of PyTorch's threads keep the mode that torch.set_flush_denormal chose.

    In a process of its own, whose pool of threads is started by our kernel.
    """
    script = f"""
import torch
from effkernels import ops
torch.set_num_threads(2)
torch.set_flush_denormal({flushed})
x, eye = torch.ones(1, 64, 64, 64), torch.eye(64).view(64, 64, 1, 1)
taps, small = torch.ones(64, 1, 3, 3), torch.full((1 << 20,), 1e-40)
for _ in range(3):
    ops.pointwise_bn_act(x, eye)
    ops.depthwise_bn_act(x, taps, padding=(1, 1, 1, 1))
    kept = (small * 1.0 != 0).float().mean().item()
    assert kept == {0.0 if flushed else 1.0}, kept
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", [1, 3])  # with the weights kept as packed, and without
def test_recordings_do_the_same(batch: int, isa: str) -> None:
    case = Case("pointwise_bn_act", **LARGE | {"batch": batch}, parameters="same")
    given = with_every_other(case.draw(), PARAMETERS, SMALLEST / 3)
    with torch.inference_mode():
        recording = Recording(lambda x: flat(ops).pointwise_bn_act(**given | {"x": x}), given["x"])
        recording.replay()
        assert isinstance(recording.output, Tensor)
        assert torch.equal(recording.output, flat(ops).pointwise_bn_act(**with_every_other(given, PARAMETERS, 0.0)))

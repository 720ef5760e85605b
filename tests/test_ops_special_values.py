"""Infinities, NaN, the largest and the smallest numbers: every operator on every backend gives what PyTorch gives.

The definition is PyTorch in float64, rounded to the type of the result. Its own float32 and 16-bit functions disagree
with it, and with each other, in two places (torch 2.13, CPU): gelu of a vectorised contiguous tensor gives NaN for inf
and inf for the largest number, elsewhere inf and the largest number; hardswish of the largest number overflows to inf.

Each value arrives at the activation as it is: one input channel with a weight of 1, or a pixel alone in its window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import op_cases
import pytest
import torch
from conftest import Backend, need
from op_cases import DTYPES, EXPAND_OP, Case
from parity import Errors, assert_within, errors, rounding
from torch import Tensor

import effkernels

ACTIVATIONS = effkernels.ops.reference.ACTIVATIONS
GATES = effkernels.ops.reference.GATES
INF, NAN = torch.inf, torch.nan
CHANNELS = 20  # a vector and a rest, of every instruction set
SMALLEST = torch.finfo(torch.float32).tiny


def special_values(dtype: torch.dtype) -> Tensor:
    of = torch.finfo(dtype)
    one_sign = torch.tensor([INF, NAN, 0.0, of.max, of.max / 2, of.tiny, of.tiny / 2], dtype=torch.float64)
    return torch.cat([one_sign, -one_sign]).to(dtype)


def values(dtype: torch.dtype) -> Tensor:
    """Return inputs for activations: special values, points where their formulas change, and ordinary numbers."""
    turns = torch.tensor([1000.0, 104.0, 90.0, 88.0, 87.5, 87.0, 50.0, 20.0, 14.5, 10.5, 9.0, 6.0, 3.0])
    return torch.cat([special_values(dtype), *(t.to(dtype) for t in (turns, -turns, torch.linspace(-12, 12, 97)))])


def alone(v: Tensor, channels: int) -> Tensor:
    """(1, channels, 3, 2 V + 1): of windows of 3x3 at stride 2, number i has v[i] in its middle and zeros around it."""
    x = v.new_zeros(1, channels, 3, 2 * v.numel() + 1)
    x[:, :, 1, 1::2] = v
    return x.contiguous(memory_format=torch.channels_last)


def centre(channels: int) -> Tensor:
    """Return a 3x3 weight (channels, 1, 3, 3) that picks the middle of its window."""
    weight = torch.zeros(channels, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    return weight


def calls(op: str, dtype: torch.dtype) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Arguments of `op`, and for each element of its first output (before broadcasting) the value that is in it."""
    v = values(dtype)
    strided = {"stride": 2, "padding": (0, 0, 0, 0)}
    for activation in ACTIVATIONS:
        if op == "pointwise_bn_act":
            ones = {"weight": torch.ones(CHANNELS, 1, 1, 1), "activation": activation}
            yield {"x": v.view(1, 1, 1, -1), **ones}, v
            yield (
                {"x": v.view(-1, 1, 1, 1), **ones},
                v.view(-1, 1, 1, 1),
            )  # images of one pixel have a kernel of their own
        elif op == "conv_bn_act":
            yield {"x": alone(v, 1), "weight": centre(CHANNELS), "activation": activation, **strided}, v
        elif op == EXPAND_OP:
            expand = {"expand_weight": torch.ones(CHANNELS, 1, 1, 1), "weight": centre(CHANNELS), **strided}
            for both in ((activation, "identity"), ("identity", activation)):
                chosen = {"expand_activation": both[0], "activation": both[1]}
                yield {"x": alone(v, 1), **expand, **chosen}, v
        elif op == "squeeze_excite_gate":
            pooled = torch.zeros(v.numel(), CHANNELS)
            pooled[:, 3] = v.float()
            w_reduce = torch.zeros(1, CHANNELS)
            w_reduce[:, 3] = 1
            for gate in GATES:
                matrices = {"w_reduce": w_reduce, "b_reduce": None, "w_expand": torch.ones(CHANNELS, 1).to(dtype)}
                matrices["b_expand"] = None
                yield {"pooled": pooled, **matrices, "activation": activation, "gate_activation": gate}, v.view(-1, 1)
        elif op == "depthwise_bn_act":
            yield {"x": alone(v, CHANNELS), "weight": centre(CHANNELS), "activation": activation, **strided}, v


def assert_as_defined(
    y: Tensor, theirs: Tensor, truth: Tensor, arrived: Tensor, what: str, *, exact: bool, rounded: float = 0.0
) -> None:
    """NaN and infinities where `truth` has them, and finite values by the rule of parity.py, large inputs apart from
    ordinary ones; of a denormal input zero or the right value.

    Args:
        y, theirs, truth: of one shape: the backend's result, PyTorch's in the same dtype, PyTorch's in float64.
        arrived: what reached the activation, broadcast to that shape.
        exact: whether large negative inputs must not leave anything visible of what underflows.
        rounded: the error of PyTorch that counts where its own is smaller by chance: the largest numbers are exact.
    """
    wanted = truth.to(y.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(y) != kind(wanted)
        assert not wrong.any(), f"{what}: {y[wrong]}, expected {wanted[wrong]}, of {arrived.expand_as(y)[wrong]}"
    arrived = arrived.expand_as(y).double()
    finite = torch.isfinite(wanted)
    for name, group in (("large", arrived.abs() > 128), ("ordinary", arrived.abs() <= 128)):
        group = group & finite
        known = group & torch.isfinite(theirs)
        own = [errors(theirs[known], truth[known]), Errors(rounded, rounded)]
        assert_within(y[group], own, truth[group], f"{what}, {name} inputs")
    if exact:
        vanished = finite & (arrived < -128) & (wanted == 0)
        assert (y[vanished].double().abs() <= SMALLEST).all(), f"{what}: {y[vanished]} of {arrived[vanished]}"
    least = torch.finfo(y.dtype)
    small = finite & (truth.abs() <= least.tiny) & (arrived.abs() <= least.tiny)
    allowed = max(SMALLEST, least.tiny * least.eps)
    assert ((y[small].double() - truth[small]).abs() <= allowed).all(), f"{what}: {y[small]} of {arrived[small]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "op", ["depthwise_bn_act", "pointwise_bn_act", "conv_bn_act", EXPAND_OP, "squeeze_excite_gate"]
)
def test_activations_and_gates(op: str, dtype: torch.dtype, backend: Backend) -> None:
    need(backend, op, dtype)
    # The emulated tanh of 16-bit types errs by all that the instruction may err by, also where it is -1 on a GPU.
    exact = backend.emulated is None or dtype is torch.float32
    for arguments, arrived in calls(op, dtype):
        arguments = on(backend, arguments)
        for y, theirs, truth in outputs(op, arguments):
            if y.dim() == 2 and op == EXPAND_OP:  # the mean of a plane with everything in it
                assert y.isnan().all()
                continue
            named = {name: a for name, a in arguments.items() if isinstance(a, str)}
            assert_as_defined(y, theirs, truth, arrived.to(y.device), f"{op} {named}", exact=exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["depthwise_bn_act_squeeze", EXPAND_OP])
def test_means(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """The mean of a plane with one special value among ordinary ones."""
    need(backend, op, dtype)
    v = special_values(dtype)
    x = torch.zeros(v.numel(), 1, 5, 5, dtype=dtype)
    x[:, 0, 1::2, 1::2] = torch.tensor([[0.5, -1.0], [2.0, 0.25]]).to(dtype)
    x[:, 0, 1, 3] = v
    arguments = {"stride": 2, "padding": (0, 0, 0, 0)}
    if op == EXPAND_OP:
        arguments |= {"x": x, "expand_weight": torch.ones(CHANNELS, 1, 1, 1), "weight": centre(CHANNELS)}
        arrived = v.view(-1, 1)
    else:
        arguments |= {"x": x.view(1, -1, 5, 5), "weight": centre(v.numel())}
        arrived = v.view(1, -1)
    arguments = on(backend, arguments)
    for activation in ACTIVATIONS:
        _, (pooled, theirs, truth) = outputs(op, arguments | {"activation": activation})
        of = arrived.to(pooled.device)
        # The means are float32, and those of PyTorch of values that were rounded to x's type.
        assert_as_defined(pooled, theirs, truth, of, f"{op} {activation}", exact=False, rounded=rounding(dtype) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["depthwise_bn_act_gate", "depthwise_bn_act_se"])
def test_excitation(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """One special value in an image: what the means, the gate and the scaling make of it, inf * 0 included."""
    need(backend, op, dtype)
    v = special_values(dtype)
    case = Case(op, dtype, batch=v.numel(), channels=CHANNELS, height=5, width=5, stride=2, padding=(0, 0, 0, 0))
    drawn = case.draw() | {"weight": centre(CHANNELS), "norm_mean": None, "norm_var": None}
    drawn |= {"norm_weight": None, "norm_bias": None}
    x = drawn["x"]
    x[:, :, ::2], x[:, :, :, ::2] = 0, 0
    x[:, 3, 1, 3] = v
    for activation in ACTIVATIONS:
        for gate in GATES:
            chosen = {"activation": activation, "se_activation": activation, "gate_activation": gate}
            for y, _, truth in outputs(op, on(backend, drawn | chosen)):
                assert_not_finite_alike(y, truth, f"{op} {chosen}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_norm_and_residual(dtype: torch.dtype, backend: Backend) -> None:
    """inf * 0, inf - inf and a norm with infinite or impossible statistics, in all combinations."""
    need(backend, "pointwise_bn_act", dtype)
    largest = torch.finfo(dtype).max
    x = torch.tensor([INF, -INF, NAN, 0.0, 1.0, -1.0, largest, -largest])
    gate = torch.tensor([0.0, 1.0, -1.0, INF, NAN])
    residual = torch.tensor([0.0, INF, -INF, NAN, largest, -largest])
    x, gate, residual = (t.reshape(-1) for t in torch.meshgrid(x, gate, residual, indexing="ij"))
    weight, bias, mean, var = (
        t.reshape(-1)
        for t in torch.meshgrid(
            torch.tensor([1.0, 0.0, -1.0, INF]),
            torch.tensor([0.0, INF]),
            torch.tensor([0.0, INF, -INF, NAN]),
            torch.tensor([1.0, INF, -1.0]),
            indexing="ij",
        )
    )
    channels = weight.numel()
    arguments = {
        "x": x.to(dtype).view(-1, 1, 1, 1).expand(-1, 1, 2, 1).contiguous(memory_format=torch.channels_last),
        "weight": torch.ones(channels, 1, 1, 1),
        "gate": gate.to(dtype).view(-1, 1),
        "residual": residual.to(dtype).view(-1, 1, 1, 1).expand(-1, channels, 2, 1).contiguous(),
        "norm_weight": weight,
        "norm_bias": bias,
        "norm_mean": mean,
        "norm_var": var,
    }
    for activation in ("identity", "relu", "silu"):
        ((y, _, truth),) = outputs("pointwise_bn_act", on(backend, arguments | {"activation": activation}))
        assert_not_finite_alike(y, truth, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["depthwise_bn_act", "pointwise_bn_act", "conv_bn_act"])
def test_results_overflow_as_rounding_does(op: str, dtype: torch.dtype, backend: Backend) -> None:
    """From half a unit above the largest number on a result is inf; below that it is the largest number."""
    need(backend, op, dtype)
    of = torch.finfo(dtype)
    half_unit = math.ldexp(of.eps, math.frexp(of.max)[1] - 2)
    bias = torch.tensor([0.0, 0.5, 1.0, 2.0]) * half_unit
    wanted = [of.max, of.max, INF, INF]
    for sign in (1, -1):
        x = torch.full((1, 4, 1, 1), sign * of.max, dtype=dtype)
        arguments: dict[str, Any] = {"x": x, "bias": sign * bias}
        if op == "depthwise_bn_act":
            arguments |= {"weight": centre(4), "padding": (1, 1, 1, 1)}
        else:
            arguments |= {"x": x[:, :1], "weight": torch.ones(4, 1, 1, 1)}
        ((y, *_),) = outputs(op, on(backend, arguments))
        assert (sign * y.double()).flatten().tolist() == wanted


def on(backend: Backend, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: a.to(backend.device) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def outputs(op: str, arguments: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each output: the backend's, PyTorch's in the same dtype, PyTorch's in float64."""
    case = Case(op)
    ours = op_cases.run(effkernels.ops, case, arguments)
    with op_cases.one_thread():
        # On the CPU, as the truth and for its reason.
        theirs = op_cases.run(effkernels.ops.reference, case, op_cases.on_cpu(arguments))
        truth = op_cases.truth(case, arguments)
    return [(y, own.to(y.device), exact) for y, own, exact in zip(ours, theirs, truth, strict=True)]


def assert_not_finite_alike(y: Tensor, truth: Tensor, what: str) -> None:
    wanted = truth.to(y.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        wrong = kind(y) != kind(wanted)
        assert not wrong.any(), f"{what}: {y[wrong]}, expected {wanted[wrong]} at {wrong.nonzero()[:5].tolist()}"

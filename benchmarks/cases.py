"""The cases of the suite: networks, the operators at the shapes of EfficientNet-B0, and the cost of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from effkernels import ops
from effkernels.bench.contenders import Case
from effkernels.bench.networks import model_size
from effkernels.bench.op_case import OpCase, conv_case, depthwise_case, gate_case, pointwise_case
from effkernels.ops import reference

# (model, batch, precision), per device type.
MODELS = {
    "cpu": (
        ("efficientnet_b0", 1, "float32"),
        ("efficientnet_b0", 16, "float32"),
        ("efficientnet_b0", 1, "bfloat16"),
        ("efficientnet_b0", 16, "bfloat16"),
        ("efficientnet_b4", 1, "float32"),
    ),
    "cuda": (
        ("efficientnet_b0", 1, "bfloat16"),
        ("efficientnet_b0", 256, "bfloat16"),
        ("efficientnet_b0", 1, "float32"),
        ("efficientnet_b4", 256, "bfloat16"),
    ),
}

OP_BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}
OP_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def model_cases(device: torch.device, threads: int) -> Iterator[Case]:
    """Return the networks for a device, each at its own input size."""
    for model, batch, precision in MODELS[device.type]:
        yield Case(
            model, model_size(model), batch, precision, str(device), threads, channels_last=device.type == "cuda"
        )


def op_cases(batch: int) -> Iterator[OpCase]:
    """Return every operator at the shapes where EfficientNet-B0 at 224 spends its time, early, middle and late."""
    yield conv_case((batch, 3, 224, 224), 32)
    # (channels, plane, kernel, stride, squeeze-and-excitation width)
    for channels, plane, kernel, stride, reduced in (
        (32, 112, 3, 1, 8),
        (96, 112, 3, 2, 4),
        (240, 28, 5, 1, 10),
        (672, 14, 5, 1, 28),
        (1152, 7, 5, 1, 48),
    ):
        yield depthwise_case("depthwise_bn_act_gate", (batch, channels, plane, plane), kernel, stride, reduced=reduced)
    for op in ("depthwise_bn_act", "depthwise_bn_act_squeeze", "depthwise_bn_act_se"):
        yield depthwise_case(op, (batch, 240, 28, 28), 5, 1, reduced=10)
    yield gate_case(batch, 1152, 48)
    # expand, then project, each early and late
    yield pointwise_case((batch, 16, 112, 112), 96, activation="silu")
    yield pointwise_case((batch, 192, 7, 7), 1152, activation="silu")
    yield pointwise_case((batch, 144, 56, 56), 24, gate=True, residual=True)
    yield pointwise_case((batch, 1152, 7, 7), 192, gate=True, residual=True)


def overhead_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the same depthwise operator with next to no work (eight values), through each of its faces.

    What is left is the cost of the call itself: argument checks and choice of backend in Python, the dispatcher, the
    adaptor. One bare convolution of PyTorch is measured for comparison.
    """
    case = depthwise_case("depthwise_bn_act", (1, 8, 1, 1), 3, 1)
    call = case.prepare(ops, torch.float32, device)
    plain = case.prepare(reference, torch.float32, device)
    x, weight, mean, var, scale, shift = (
        case.tensors[name].to(device, torch.float32)
        for name in ("x", "weight", "norm_mean", "norm_var", "norm_weight", "norm_bias")
    )
    compiled = torch.ops.effkernels.depthwise_bn_act.default
    convolution = torch.nn.functional.conv2d
    return {
        "effkernels.ops": call,
        "torch.ops.effkernels": lambda: compiled(
            x, weight, None, mean, var, scale, shift, 1e-5, 1, (1, 1, 1, 1), 1, "silu"
        ),
        "eager": plain,
        "conv2d alone": lambda: convolution(x, weight, padding=1, groups=8),
    }

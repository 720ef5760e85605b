"""The cases of the suite: networks, the operators at the shapes of EfficientNet-B0, and the cost of a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from effkernels import ops
from effkernels.bench.contenders import NetworkCase
from effkernels.bench.networks import model_size
from effkernels.ops import reference
from effkernels.ops.call import OpCall, prepared

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

# Contenders of the networks that are left out: they measure while they compile, or compute something else.
LEFT_OUT = {"cpu": ("compile-max-autotune", "onnxruntime-int8", "openvino-int8"), "cuda": ()}

OP_BATCHES = {"cpu": (1, 16), "cuda": (1, 256)}
OP_DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}


def model_cases(device: torch.device, threads: int) -> Iterator[NetworkCase]:
    """Return the networks for a device, each at its own input size."""
    for model, batch, precision in MODELS[device.type]:
        yield NetworkCase(
            model, model_size(model), batch, precision, str(device), threads, channels_last=device.type == "cuda"
        )


def op_calls(batch: int) -> Iterator[OpCall]:
    """Return every operator at the shapes where EfficientNet-B0 at 224 spends its time, early, middle and late."""
    yield OpCall.on("conv_bn_act", (batch, 3, 224, 224), out_channels=32, stride=2)
    # (channels, plane, kernel, stride, squeeze-and-excitation width)
    for channels, plane, kernel, stride, reduced in (
        (32, 112, 3, 1, 8),
        (96, 112, 3, 2, 4),
        (240, 28, 5, 1, 10),
        (672, 14, 5, 1, 28),
        (1152, 7, 5, 1, 48),
    ):
        shape = (batch, channels, plane, plane)
        yield OpCall.on("depthwise_bn_act_gate", shape, kernel, stride=stride, reduced=reduced)
    for op in ("depthwise_bn_act", "depthwise_bn_act_squeeze"):
        yield OpCall.on(op, (batch, 240, 28, 28), 5)
    yield OpCall.on("depthwise_bn_act_se", (batch, 240, 28, 28), 5, reduced=10)
    yield OpCall.on("squeeze_excite_gate", (batch, 1152), reduced=48)
    # expand, then project, each early and late
    for channels, plane, out in ((16, 112, 96), (192, 7, 1152)):
        yield OpCall.on("pointwise_bn_act", (batch, channels, plane, plane), out_channels=out)
    yield OpCall.on("pointwise_bn_act_pool", (batch, 320, 7, 7), out_channels=1280)
    for channels, plane, out in ((144, 56, 24), (1152, 7, 192)):
        shape = (batch, channels, plane, plane)
        yield OpCall.on("pointwise_bn_act", shape, out_channels=out, activation="identity", gated=True, residual=True)


def overhead_calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the same depthwise operator with next to no work (eight values), through each of its faces.

    What is left is the cost of the call itself: argument checks and choice of backend in Python, the dispatcher, the
    adaptor. One bare convolution of PyTorch is measured for comparison.
    """
    arguments = OpCall.on("depthwise_bn_act", (1, 8, 1, 1)).arguments(torch.float32, device)
    call, plain = (prepared(module, "depthwise_bn_act", arguments) for module in (ops, reference))
    x, weight, mean, var, scale, shift = (
        arguments[name] for name in ("x", "weight", "norm_mean", "norm_var", "norm_weight", "norm_bias")
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

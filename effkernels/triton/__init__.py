"""The operators as Triton kernels, one file per family.

This file imports no triton, so that the package also loads where there is none, and so that a process that never runs a
Triton kernel does not pay for the import: `implementation` imports a family with its first call.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

# The module of this package that holds each operator, in its dictionary OPERATORS.
FAMILIES: dict[str, str] = {
    "depthwise_bn_act": "depthwise",
    "depthwise_bn_act_squeeze": "depthwise",
    "squeeze_excite_gate": "squeeze_excite",
    "depthwise_bn_act_gate": "depthwise",
    "depthwise_bn_act_se": "depthwise",
    "pointwise_bn_act": "pointwise",
    "pointwise_bn_act_pool": "pointwise",
    "expand_depthwise_squeeze": "expand_depthwise",
    "mbconv": "mbconv",
    "conv_bn_act": "conv",
}

# The module that holds each step of a training block, in its dictionary STEPS.
TRAINING_STEPS: dict[str, str] = {
    "training_statistics": "training",
    "training_norm_act": "training",
    "training_squeeze": "training",
    "training_gradient_sums": "training",
    "training_norm_backward": "training",
    "training_depthwise": "training_depthwise",
    "training_depthwise_backward": "training_depthwise",
}

# Whether Triton interprets its kernels on the CPU in this process. Triton reads the same variable as it compiles the
# first kernel and understands the same words.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

INSTALLED: bool = importlib.util.find_spec("triton") is not None

# Elements of an image that one program scales by the gate in the launch that computes it.
MOST_SCALED_ALONE = 1 << 16


@cache
def implementation(op: str) -> Callable[..., None]:
    """Return the function that computes `op`.

    It takes the result to fill (a tensor or a tuple of them) and the arguments in the order of the schema, each norm as
    one value, already checked, and never an empty batch.
    """
    module = importlib.import_module(f"{__name__}.{FAMILIES[op]}")
    function: Callable[..., None] = module.OPERATORS[op]
    return function


@cache
def training_step(name: str) -> Callable[..., Any]:
    """Return the function of `TRAINING_STEPS` that is called, and returns, as the compiled operator of that name."""
    module = importlib.import_module(f"{__name__}.{TRAINING_STEPS[name]}")
    function: Callable[..., Any] = module.STEPS[name]
    return function


def launches_of(op: str, channels: int = 0, out_height: int = 0, out_width: int = 0, *, one_pass: bool = True) -> int:
    """Return the number of launches of Triton kernels for one call of `op`: one, with three exceptions.

    If an image of its result has more than `MOST_SCALED_ALONE` elements, a second launch of `depthwise_bn_act_se`
    multiplies by the gate. `expand_depthwise_squeeze` takes two if its expanded tensor is not kept on the chip.
    `mbconv` takes three.
    (`conv_bn_act` with more than 128 factors to a sum, input channels times kernel size, also runs PyTorch's
    convolution, which is none of these.)

    Args:
        channels, out_height, out_width: of the result; only `depthwise_bn_act_se` depends on them.
        one_pass: of `expand_depthwise_squeeze`, what effkernels.triton.expand_depthwise.one_pass says of the call.

    Raises:
        ValueError: there is no Triton implementation of op.
    """
    if op not in FAMILIES:
        raise ValueError(f"no Triton implementation of {op!r}; allowed: {', '.join(FAMILIES)}")
    if op == "mbconv":
        return 3
    scaled_apart = op == "depthwise_bn_act_se" and channels * out_height * out_width > MOST_SCALED_ALONE
    written = op == "expand_depthwise_squeeze" and not one_pass
    return 2 if scaled_apart or written else 1


def problem_of(op: str, device: Any) -> str:
    """Why Triton cannot run `op`, an operator or a step of training, on a torch.device; "" where it can."""
    if op not in FAMILIES and op not in TRAINING_STEPS:
        return f"no Triton implementation of {op}"
    if not INSTALLED:
        return "triton is not installed"
    if device.type in ("cuda", "meta") or (device.type == "cpu" and INTERPRETED):
        return ""
    only = "cuda, and cpu where TRITON_INTERPRET=1 is set before the start" if device.type == "cpu" else "cuda"
    return f"device={device} is not supported; allowed: {only}"

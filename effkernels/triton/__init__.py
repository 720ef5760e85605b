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
    "conv_bn_act": "conv",
}

# Whether Triton interprets its kernels on the CPU in this process. Triton reads the same variable as it compiles the
# first kernel and understands the same words.
INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")

INSTALLED: bool = importlib.util.find_spec("triton") is not None


@cache
def implementation(op: str) -> Callable[..., None]:
    """The function that computes `op`: it takes the result to fill (a tensor or a tuple of them) and the arguments of
    the schema, already checked, and never an empty batch.
    """
    module = importlib.import_module(f"{__name__}.{FAMILIES[op]}")
    function: Callable[..., None] = module.OPERATORS[op]
    return function


def problem_of(op: str, device: Any) -> str:
    """Why Triton cannot run `op` on a torch.device; "" where it can."""
    if op not in FAMILIES:
        return f"no Triton implementation of {op}"
    if not INSTALLED:
        return "triton is not installed"
    if device.type in ("cuda", "meta") or (device.type == "cpu" and INTERPRETED):
        return ""
    only = "cuda, and cpu where TRITON_INTERPRET=1 is set before the start" if device.type == "cpu" else "cuda"
    return f"device={device} is not supported; allowed: {only}"

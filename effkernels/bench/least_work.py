"""What no version of a module can avoid: its bytes and its FLOPs."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effkernels


def least_work(module: nn.Module, shape: tuple[int, ...], out: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes and the FLOPs that no version of a module can avoid.

    Images and parameters are read once and the result is written once; a multiply-add is two FLOPs.

    Args:
        module: is moved to the meta device.
        shape, out: (N, C, H, W) of the input, and the shape of the result.
    """
    module = module.to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), effkernels.backend("reference"):
        module(torch.empty(shape, device="meta"))
    values = math.prod(shape) + math.prod(out) + sum(weight.numel() for weight in module.parameters())
    return values * dtype.itemsize, int(counter.get_total_flops())

"""Decide whether a float32 product may run in TF32 if the caller leaves it to PyTorch's setting for convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effkernels.ops._trace import constant_in_a_trace


def resolve(allow_tf32: bool | None, x: Tensor) -> bool:
    """Return the `allow_tf32` to hand to a kernel: as given, or PyTorch's setting for cuDNN convolutions.

    Only a float32 tensor on a CUDA device is ever asked about; elsewhere the answer is False and costs nothing.
    """
    if allow_tf32 is not None:
        return allow_tf32
    return x.is_cuda and x.dtype == torch.float32 and _convolutions_may_use_tf32()


@constant_in_a_trace
def _convolutions_may_use_tf32() -> bool:
    # Not torch.backends.cudnn.allow_tf32: it raises where convolutions and recurrent nets are set differently. A trace
    # keeps the answer of its own time; reading the property inside the trace would break the graph.
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return bool(convolutions.fp32_precision == "tf32")

"""The operator calls of a network, recorded on the meta device."""

from __future__ import annotations

from functools import cache

import torch

import effkernels
from effkernels import triton
from effkernels.models import model_config
from effkernels.ops.call import OpCall
from effkernels.plan.record import record_calls


@cache
def calls_of(model: str, img_size: int | None = None) -> tuple[OpCall, ...]:
    """Return the distinct operator calls of a network in eval mode at batch 1, in the order of the forward.

    Args:
        model: one of `effkernels.list_models()`.
        img_size: height and width of its images in pixels; by default what it was designed for.

    Raises:
        ValueError: the model is not known.
        RuntimeError: neither Triton nor the compiled library, whose shape functions are needed, is available.
    """
    size = img_size or model_config(model).input_size[-1]
    network = effkernels.create_model(model, device="meta").eval()
    # On the meta device only the shape functions run, which all devices share.
    with effkernels.backend("triton" if triton.INSTALLED else "cpu"):
        recorded = record_calls(network, torch.empty(1, 3, size, size, device="meta"))
    ours = (call for call in recorded if not call.op.startswith("aten::"))
    return tuple(dict.fromkeys(OpCall.of(call.op.partition("::")[2], call.arguments) for call in ours))

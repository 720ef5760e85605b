"""The operator calls of a network, recorded on the meta device."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

import effkernels
from effkernels import triton
from effkernels.bench.foreign import fused_on_meta
from effkernels.models.sources import find_model, input_size_of_source
from effkernels.ops.call import OpCall
from effkernels.plan.record import record_calls


@cache
def calls_of(model: str, img_size: int | None = None) -> tuple[OpCall, ...]:
    """Return the distinct operator calls of a network in eval mode at batch 1, in the order of the forward.

    Another library's network makes them after `optimize_`; see `effkernels.bench.foreign`.

    Args:
        model: one of the forms of `effkernels.models.sources.find_model`.
        img_size: height and width of its images in pixels; by default what it was designed for.

    Raises:
        ValueError: the model is not known, or cannot be built.
        ImportError, OSError: as of `find_model`.
        RuntimeError: neither Triton nor the compiled library, whose shape functions are needed, is available.
    """
    source = find_model(model)
    channels, height, width = input_size_of_source(source)
    if img_size is not None:
        height = width = img_size
    if source.is_own:
        network: nn.Module = effkernels.create_model(model, device="meta").eval()
    else:
        network, _ = fused_on_meta(source, (channels, height, width))
    # On the meta device only the shape functions run, which all devices share.
    with effkernels.backend("triton" if triton.INSTALLED else "cpu"):
        recorded = record_calls(network, torch.empty(1, channels, height, width, device="meta"))
    ours = (call for call in recorded if not call.op.startswith("aten::"))
    return tuple(dict.fromkeys(OpCall.of(call.op.partition("::")[2], call.arguments) for call in ours))

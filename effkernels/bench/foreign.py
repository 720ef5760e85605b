"""Networks of other libraries and of users' files where this package's operators are counted: fused, without memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effkernels.models.sources import LogitsOnly, ModelSource, unwrapped
from effkernels.optimize import Report, optimize_, restore_
from effkernels.optimize.twins import Twins


def fused_on_meta(
    source: ModelSource, input_size: tuple[int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Report]:
    """Return a model after `optimize_`, on the meta device, and the report on what of it runs fused.

    A launch plan and the tuner need the calls of this package's operators, which another library's network makes only
    after `optimize_`. That compares each block with its original forward, so it is done on the CPU, in float32, on a
    copy with random weights; then the memory is given up.

    Args:
        input_size: (channels, height, width) of an image.
        dtype: of the result's parameters.

    Raises:
        ValueError, ImportError, OSError: as of `ModelSource.build`.
    """
    model = unwrapped(source.build())
    report = optimize_(model, input_size=input_size)
    return _without_memory(model, dtype), report


def training_on_meta(source: ModelSource, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Report]:
    """Return a model after ``optimize_(model, mode="training")`` and as it was, on the meta device, and the report.

    Both are in training mode, with parameters that need a gradient, and return logits.

    Args:
        dtype: of the results' parameters.

    Raises:
        ValueError, ImportError, OSError: as of `ModelSource.build`.
    """
    built = source.build()
    model = unwrapped(built).train()
    report = optimize_(model, mode="training")
    fused = _without_memory(model, dtype)
    restore_(model)
    networks = [fused, _without_memory(model, dtype)]
    for network in networks:
        network.train().requires_grad_()
    first, second = (LogitsOnly(one) if isinstance(built, LogitsOnly) else one for one in networks)
    return first, second, report


def _without_memory(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    def convert(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta", dtype=dtype if tensor.is_floating_point() else None)

    return Twins(model, plain=False, convert=convert).root

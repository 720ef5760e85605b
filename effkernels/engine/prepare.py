"""The engine's own copy of a model, and how new weights get into it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from effkernels.engine.memory import model_tensors
from effkernels.models import EfficientNet, EfficientNetFeatures


@dataclass(frozen=True)
class Preparation:
    """The options for preparing a model; the attributes are arguments of `InferenceEngine`."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    optimize: bool
    fold_norms: bool


@dataclass(frozen=True)
class Prepared:
    """A prepared model, and what was done to it (as in `EngineReport`)."""

    model: nn.Module
    optimized: str
    norms_folded: int | None


def device_and_dtype_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of a model's first floating tensor; the CPU and torch's default without one."""
    for tensor in model_tensors(model).values():
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def prepare(model: nn.Module, how: Preparation) -> Prepared:
    """Return a copy of a model, ready to serve; the model itself stays as it is.

    Raises:
        TypeError: the model cannot be copied.
    """
    # Outside of inference mode: its tensors could not be written by `refresh` later.
    with torch._C._InferenceMode(False), torch.no_grad():
        try:
            ours = copy.deepcopy(model)
        except Exception as error:
            raise TypeError(f"InferenceEngine: {type(model).__name__} cannot be copied: {error}") from error
        _give_every_element_memory(ours)
        ours = ours.eval().to(how.device, how.dtype)
        ours = ours.to(memory_format=how.memory_format)  # type: ignore[call-overload]
        folded = None
        if how.fold_norms:
            from effkernels.optimize import fold_bn_

            folded = fold_bn_(ours)
        return Prepared(ours, _optimized(ours) if how.optimize else "not asked for", folded)


def _give_every_element_memory(model: nn.Module) -> None:
    """Copy the buffers that are expanded, which `refresh` could not write to."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or buffer.layout is not torch.strided or buffer.is_nested:
                continue
            if torch._debug_has_internal_overlap(buffer) == 1:
                module._buffers[name] = buffer.clone()


def _optimized(model: nn.Module) -> str:
    if isinstance(model, (EfficientNet, EfficientNetFeatures)):
        return "nothing to do: the model is effkernels' own"
    from effkernels.optimize import optimize_

    report = optimize_(model)
    return f"{report.fused} blocks fused"


def structure_of(model: nn.Module) -> tuple[str, ...]:
    """Return what has to stay the same for new weights to fit: the modules as they print, and every tensor's shape."""
    tensors = (f"{name}: {tuple(tensor.shape)}" for name, tensor in model_tensors(model).items())
    return (*repr(model).splitlines(), *tensors)


def check_structure(found: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    """Refuse a model of another structure.

    Raises:
        ValueError: names the first difference.
    """
    for ours, theirs in zip_longest(wanted, found, fillvalue="nothing"):
        if ours != theirs:
            raise ValueError(
                f"refresh: the model has {theirs.strip()!r} where the engine was made with {ours.strip()!r}; only "
                "weights may change. Make a new engine"
            )


def new_weights(source: nn.Module, into: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's tensors, and those of a second model in their place, with the first's device and dtype.

    Writing the one to the other cannot fail any more. What has device and dtype already is not copied.

    Raises:
        ValueError: a tensor of the second one does not fit or has no values.
    """
    ours, theirs = model_tensors(into), model_tensors(source)
    if {name: tensor.shape for name, tensor in ours.items()} != {name: tensor.shape for name, tensor in theirs.items()}:
        raise ValueError("refresh: the model has other parameters or buffers than the engine was made with")
    with torch._C._InferenceMode(False), torch.no_grad():
        for name, tensor in ours.items():
            if _kind(theirs[name]) != _kind(tensor):
                raise ValueError(
                    f"refresh: {name} is a {_kind(theirs[name])} tensor, and the engine's is a {_kind(tensor)} one; "
                    "only weights may change. Make a new engine"
                )
        return list(ours.values()), [
            theirs[name].detach().to(tensor.device, tensor.dtype) for name, tensor in ours.items()
        ]


def _kind(tensor: Tensor) -> str:
    """Return what has to be the same for one tensor to be written to another: kind of number, layout, storage."""
    number = "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "whole-number"
    meta = ", meta" if tensor.is_meta else ""
    quantized = ", quantized" if tensor.is_quantized else ""
    nested = ", nested" if tensor.is_nested else ""
    return f"{number}, {str(tensor.layout).removeprefix('torch.')}{meta}{quantized}{nested}"

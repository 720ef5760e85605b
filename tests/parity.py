"""The tolerance rule: as exact as PyTorch itself, within a factor of two.

A result is held against the float64 reference on the very same (already rounded) inputs. Its error, as relative L2 and
as max|d| / max|ref|, may be at most twice the error that PyTorch makes in the same dtype, plus one rounding of the
output type. Nothing is tuned: a kernel that is less exact than that is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Error:
    """Distance from the truth, both figures relative."""

    l2: float
    largest: float


def error(result: Tensor, truth: Tensor) -> Error:
    """The error of `result` against a float64 `truth` of the same shape; (0, 0) where there are no elements."""
    assert result.shape == truth.shape, f"shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return Error(0.0, 0.0)
    wanted = truth.detach().double().cpu()
    difference = result.detach().double().cpu() - wanted
    norm, peak = float(wanted.norm()), float(wanted.abs().max())
    l2, largest = float(difference.norm()), float(difference.abs().max())
    if norm == 0.0:  # all zero, as behind a relu: then every result that is not exactly zero is infinitely wrong
        return Error(0.0, 0.0) if largest == 0.0 else Error(math.inf, math.inf)
    return Error(l2 / norm, largest / peak)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def assert_parity(result: Tensor, same_dtype: Tensor | Sequence[Tensor], truth: Tensor, what: str = "result") -> None:
    """Assert the tolerance rule for one output.

    Args:
        result: of the backend under test.
        same_dtype: of plain PyTorch on the same inputs in the same dtypes. Where PyTorch has several ways that are
            equally right (memory formats), the result of each: its own error is then the largest of theirs.
        truth: of plain PyTorch in float64.
        what: names the output in the message.
    """
    plain = [same_dtype] if isinstance(same_dtype, Tensor) else same_dtype
    assert result.dtype == plain[0].dtype, f"{what}: dtype {result.dtype}, expected {plain[0].dtype}"
    assert_within(result, [error(one_way, truth) for one_way in plain], truth, what)


def assert_within(result: Tensor, own: Sequence[Error], truth: Tensor, what: str = "result") -> None:
    """Assert the tolerance rule against errors that PyTorch makes; the largest of them is its own error."""
    assert torch.isfinite(truth).all(), f"{what}: the inputs of a parity test must have a finite result"
    assert torch.isfinite(result).all(), f"{what}: not finite where the reference is"
    ours = error(result, truth)
    theirs = Error(max(e.l2 for e in own), max(e.largest for e in own))
    one = rounding(result.dtype)
    for figure in ("l2", "largest"):
        found, allowed = getattr(ours, figure), FACTOR * getattr(theirs, figure) + one
        assert found <= allowed, (
            f"{what}: {figure} error {found:.3g}, allowed {allowed:.3g} "
            f"(twice PyTorch's own {getattr(theirs, figure):.3g} plus one rounding {one:.3g})"
        )


def assert_exact_channels_last(t: Tensor, what: str = "result") -> None:
    """Assert the strides that torch.empty(shape, memory_format=torch.channels_last) gives."""
    wanted = torch.empty(t.shape, memory_format=torch.channels_last, device="meta").stride()
    assert t.stride() == wanted, f"{what}: strides {t.stride()} of shape {tuple(t.shape)}, expected {wanted}"


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Several draws of one output as one long tensor, so that a handful of elements is not judged by luck."""
    return torch.cat([t.flatten() for t in outputs])

"""The tolerance rule: as exact as PyTorch itself, within a factor of two.

The rule is `effkernels.ops.parity`; here are the assertions of it. A result is held against the float64 reference on
the very same (already rounded) inputs. Nothing is tuned: a kernel that is less exact than that is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effkernels.bench.measure import WRONG
from effkernels.ops.parity import FACTOR, Errors, allowed, errors, rounding

__all__ = ["FACTOR", "Errors", "errors", "rounding"]  # and what is below


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
    assert_within(result, [errors(one_way, truth) for one_way in plain], truth, what)


def assert_within(result: Tensor, own: Sequence[Errors], truth: Tensor, what: str = "result") -> None:
    """Assert the tolerance rule against errors that PyTorch makes; the largest of them is its own error."""
    assert result.shape == truth.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(truth).all(), f"{what}: the inputs of a parity test must have a finite result"
    assert torch.isfinite(result).all(), f"{what}: not finite where the reference is"
    ours, limit = errors(result, truth), allowed(own, result.dtype)
    for figure in ("l2", "largest"):
        found, most = getattr(ours, figure), getattr(limit, figure)
        assert found <= most, (
            f"{what}: {figure} error {found:.3g}, allowed {most:.3g} (twice PyTorch's own plus one rounding)"
        )


def assert_same_precision(result: Tensor, plain: Sequence[Tensor], truth: Tensor, what: str = "result") -> None:
    """Assert of the result of another library's runtime what a benchmark asks of a contender before it is timed.

    How it orders its sums is its own choice, another one on each processor: its largest error of a few thousand numbers
    is not held to the tolerance rule. A graph that means something else, or that ran in a lower precision, is off by
    thousands of times PyTorch's own error.
    """
    found, own = errors(result, truth).l2, max(errors(one_way, truth).l2 for one_way in plain)
    assert found <= WRONG * own, (
        f"{what}: L2 error {found:.3g}, allowed {WRONG * own:.3g} ({WRONG} times PyTorch's own)"
    )


def assert_exact_channels_last(t: Tensor, what: str = "result") -> None:
    """Assert the strides that torch.empty(shape, memory_format=torch.channels_last) gives."""
    wanted = torch.empty(t.shape, memory_format=torch.channels_last, device="meta").stride()
    assert t.stride() == wanted, f"{what}: strides {t.stride()} of shape {tuple(t.shape)}, expected {wanted}"


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Several draws of one output as one long tensor, so that a handful of elements is not judged by luck."""
    return torch.cat([t.flatten() for t in outputs])

"""The tolerance rule of the project: a result may be at most twice as far from the truth as PyTorch's own.

No constant is tuned. The truth is float64; PyTorch's own result is that of plain PyTorch in the same dtype; one
rounding of the output type is added. The distance is measured in two ways, as relative L2 norm and as largest
deviation over largest value, and each must hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


@dataclass(frozen=True)
class Errors:
    """Distance of a result to the truth: relative L2 norm, and largest deviation over the largest value."""

    l2: float
    largest: float


def full_float32() -> None:
    """Let PyTorch, and with it the operators of this package, compute float32 products in full in this process.

    By default cuDNN's convolutions may run in TF32, whose error is some thousand times as large, and take it or not by
    the number of channels: a comparison would hold TF32 on one side against float32 on the other. This is done by the
    older settings, because the newer ones leave a mix that the older getters refuse to read.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def errors(result: Tensor, truth: Tensor) -> Errors:
    """Both errors of a result; infinite where its shape is another or a value is not finite."""
    truth = truth.detach().double().cpu()
    if result.shape != truth.shape:
        return Errors(math.inf, math.inf)
    if truth.numel() == 0:
        return Errors(0.0, 0.0)
    difference = result.detach().double().cpu() - truth
    measured = []
    for distance, scale in (
        (torch.linalg.vector_norm(difference), torch.linalg.vector_norm(truth)),
        (difference.abs().max(), truth.abs().max()),
    ):
        if float(scale) == 0.0:  # all zero, as after a relu: then every result that is not zero is infinitely wrong
            measured.append(0.0 if float(distance) == 0.0 else math.inf)
            continue
        value = float(distance / scale)
        measured.append(value if math.isfinite(value) else math.inf)
    return Errors(*measured)


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def limits(plain: Tensor | Sequence[Tensor], truth: Tensor) -> Errors:
    """Return the largest allowed error of a result in ``plain``'s dtype, given PyTorch's own result in that dtype.

    Args:
        plain: PyTorch's result. Where PyTorch has several ways that are equally right (memory formats), the result of
            each: its own error is then the largest of theirs.
        truth: the result in float64.
    """
    ways = [plain] if isinstance(plain, Tensor) else plain
    return allowed([errors(way, truth) for way in ways], ways[0].dtype)


def allowed(own: Sequence[Errors], dtype: torch.dtype) -> Errors:
    """Return the largest allowed error of a result in ``dtype``, given PyTorch's errors in it; the largest counts."""
    one = rounding(dtype)
    return Errors(FACTOR * max(errors.l2 for errors in own) + one, FACTOR * max(errors.largest for errors in own) + one)


def judge(results: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> tuple[bool, float, float]:
    """Return whether all results keep to the rule, with error and limit of the one nearest to breaking it."""
    worst = (-1.0, 0.0, 0.0)
    for one_result, one_plain, one_truth in zip(results, plain, truth, strict=True):
        error, limit = errors(one_result, one_truth), limits(one_plain, one_truth)
        for measured, allowed in ((error.l2, limit.l2), (error.largest, limit.largest)):
            worst = max(worst, (measured / allowed, measured, allowed))
    return worst[0] <= 1, worst[1], worst[2]

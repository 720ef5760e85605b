"""Comparison of a program with the forward that it replaces, on random numbers, before it is used."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkernels.optimize.program import Program

# Odd on purpose: what a padding or a stride gets wrong shows at the border of an odd image.
SMALL_SIZES = ((9, 11), (65, 67))
GUESS_SIZES = ((12, 10), (10, 13), (33, 34))
_FACTOR = 2.0


def difference(
    module: nn.Module,
    original: Callable[..., Any],
    program: Program,
    shapes: Sequence[tuple[int, ...]],
) -> str:
    """Why `program` may not stand in for `original` (a method, unbound) of `module`; "" where it may.

    The program's error against the original run in float64 may be at most twice that of the original run as it is
    (in the worse of the two memory formats), plus one rounding: what the tests of the operators ask for.

    Args:
        shapes: of inputs, (N, C, H, W); the first that the original takes is used.
    """
    example = next((p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()), None)
    if example is None or example.is_meta:
        return ""
    complaint = "there is no input to try it on"
    for shape in shapes:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(example)
        try:
            kept = x.clone()
            plain = [list(_tensors(original(module, one))) for one in _both_formats(x)]
        except Exception as error:  # the size may not suit the module: the next one is tried
            complaint = f"its forward does not take a random input of shape {tuple(shape)}: {error}"
            continue
        if not torch.equal(x, kept):
            return "its forward overwrites its input"
        return _compare(module, original, program, x, plain)
    return complaint


def _compare(
    module: nn.Module, original: Callable[..., Any], program: Program, x: Tensor, plain: list[list[Tensor]]
) -> str:
    try:
        found = program.run(module, x)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"the fused operators refuse it: {error}"
    if found is None:
        return "it does not keep still: a second look at its modules found other settings than the first"
    results = list(_tensors(found))
    if [t.shape for t in results] != [t.shape for t in plain[0]]:
        return "its fused form gave results of other shapes"
    truth = list(_tensors(original(copy.deepcopy(module).double(), x.double())))
    for result, first, second, exact in zip(results, *plain, truth, strict=True):
        if not torch.isfinite(exact).all():
            continue  # weights that nobody has filled yet say nothing
        allowed = [_FACTOR * max(pair) for pair in zip(_error(first, exact), _error(second, exact), strict=True)]
        rounding = torch.finfo(result.dtype).eps / 2
        for distance, most in zip(_error(result, exact), allowed, strict=True):
            if not distance <= most + rounding:
                return f"its fused form is off by {distance:.2g}, where {most + rounding:.2g} is allowed"
    return ""


def _both_formats(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x.contiguous(memory_format=torch.channels_last)


def _error(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative L2, and the largest difference relative to the largest value."""
    difference = result.double() - truth
    norm, peak = float(truth.norm()), float(truth.abs().max()) if truth.numel() else 0.0
    if peak == 0.0:
        return (0.0, 0.0) if not difference.any() else (float("inf"), float("inf"))
    return float(difference.norm()) / norm, float(difference.abs().max()) / peak


def _tensors(result: Any) -> Iterator[Tensor]:
    """The floating tensors in a result."""
    leaves = pytree.tree_leaves(dict(result) if isinstance(result, dict) else result)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())

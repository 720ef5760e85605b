"""Comparison of a training program with the forward that it replaces, on random weights and numbers, before it is used.

In float64, where both compute the same up to some rounding: the result, the gradients of input and parameters, the
buffers afterwards, and the state of the random numbers. What the kernels make of it in other dtypes is tested with
them. Weights are random ones, so that a model on the meta device can be judged, and a norm that starts at zero hides
nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import conv_arguments
from effkernels.optimize.frozen import freeze
from effkernels.optimize.program import Program
from effkernels.optimize.survey import Method
from effkernels.optimize.training import TrainingProgram, training_program, with_arguments
from effkernels.optimize.twins import Mapped, Twins
from effkernels.optimize.unknown import Unknown

_SIZES = ((2, 7, 9), (2, 6, 5))  # batch, height, width: with norms that use the batch, and with frozen ones
_RATE = 0.5
_MOST = 1e-7
_SMALLEST = 1e-4  # of the largest gradient; one that is zero in exact arithmetic has no scale of its own


def checked_program(method: Method, plain: Program) -> TrainingProgram:
    """Return the program of a block in training mode, compared with its forward.

    Args:
        method: of the block, whose modules stay as they are.
        plain: its program for eval mode.

    Raises:
        Unknown: the block does not train fused; the message says why.
    """
    program = training_program(method, plain)
    # Arguments without a meaning in eval mode, such as lukemelas' drop_connect_rate.
    names = tuple(sorted(plain.ignored))
    tries = [program] if not names else [with_arguments(program, "", names), program]
    if program.recipe.residual:
        others = {name: tuple(one for one in names if one != name) for name in names}
        tries = [*(with_arguments(program, name, free) for name, free in others.items()), *tries]
    for one in tries:
        problem = _difference(method.trace.root, method.trace.method, one)
        if not problem:
            return one
    raise Unknown(problem)


def _difference(module: nn.Module, method: str, program: TrainingProgram) -> str:
    """Return why `program` may not replace a method of `module` in training mode; "" if it may."""
    recipe = program.recipe
    channels = conv_arguments(module.get_submodule(recipe.expand or recipe.depthwise))[0].shape  # type: ignore[arg-type]
    read = [name for name in (recipe.drop_argument, *recipe.free_arguments) if name]
    calls: list[dict[str, Any]] = [{}, *({name: _RATE} for name in read)]
    for frozen, (batch, *size) in enumerate(_SIZES):
        shape = (batch, channels[0 if recipe.expand is None else 1], *size)
        for kwargs in calls:
            problem = _compare(module, method, program, shape, bool(frozen), kwargs)
            if problem:
                return problem
    return ""


def _compare(
    module: nn.Module,
    method: str,
    program: TrainingProgram,
    shape: tuple[int, ...],
    frozen: bool,
    kwargs: dict[str, Any],
) -> str:
    results = []
    for run_plain in (True, False):
        twins = _twins(module, frozen)
        x = _draw(shape).requires_grad_()
        before = _attributes(twins.root)
        try:
            with _settled():
                forward = getattr(type(twins.root), method)
                y = forward(twins.root, x, **kwargs) if run_plain else program.run(twins.root, (x,), kwargs)
                if y is None:
                    return program.guard.complaint(twins.root) or "its fused form declines in training mode"
                (y * _draw(tuple(y.shape))).sum().backward()
                state = torch.get_rng_state()
        except Exception as error:  # whatever a forward does in a mode that it was not examined in
            line = str(error).strip().partition("\n")[0]
            return f"in training mode its {'forward' if run_plain else 'fused form'} fails: {line}"
        if run_plain and _attributes(twins.root) != before:
            return "its forward writes to its attributes in training mode"
        found = {"result": y.detach(), "gradient of its input": x.grad}
        found |= {f"gradient of {path}": p.grad for path, p in twins.root.named_parameters()}
        found |= {path: buffer.double() for path, buffer in twins.root.named_buffers()}
        results.append((found, state))
    (wanted, plain_state), (found, state) = results
    scale = max(float(g.abs().max()) for name, g in wanted.items() if g is not None and name.startswith("gradient"))
    for name, value in wanted.items():
        other = found[name]
        if (value is None) != (other is None):
            return f"in training mode its fused form is another function: {name}"
        if value is None or other is None:
            continue
        most = max(float(value.abs().max()), _SMALLEST * scale)
        if value.shape != other.shape or not float((value - other).abs().max()) <= _MOST * most:
            return f"in training mode its fused form is another function: {name}"
    return "" if torch.equal(plain_state, state) else "in training mode its forward draws other random numbers"


def _twins(module: nn.Module, frozen: bool) -> Twins:
    """Return a twin with random weights in float64 on the CPU, in training mode; frozen: its norms in eval mode."""
    twins = Twins(module, convert=_drawing(torch.Generator().manual_seed(0)))
    for one in twins.root.modules():
        one.training = not (frozen and isinstance(one, BatchNorm))
    for parameter in twins.root.parameters():
        parameter.requires_grad_()
    return twins


def _drawing(generator: torch.Generator) -> Mapped:
    """Return what makes of a tensor one of its shape with random numbers: weights of a size, all else positive."""

    def draw(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
        if t.dim() < 2:
            return torch.rand(t.shape, generator=generator, dtype=torch.float64, device="cpu") + 0.5
        normal = torch.randn(t.shape, generator=generator, dtype=torch.float64, device="cpu")
        return normal / math.sqrt(t[0].numel())

    return draw


def _draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Let gradients be computed, and draw the same random numbers every time (the caller keeps the state)."""
    with torch.enable_grad():
        torch.manual_seed(0)
        yield


def _attributes(root: nn.Module) -> list[dict[str, Any]]:
    """Return what a forward could write to besides parameters and buffers."""
    kept = ("_parameters", "_buffers", "_modules")
    return [
        {name: freeze(value) for name, value in module.__dict__.items() if name not in kept and "bound" not in name}
        for module in root.modules()
    ]

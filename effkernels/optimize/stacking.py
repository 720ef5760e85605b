"""Blocks that follow each other in a program as one operator, `effkernels.ops.mbconv_stack`, where each would be one.

A block keeps its own program and its own guard: the program around it asks each block at every call for its arguments,
and calls those that have none to give: with a hook, in training mode, or changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from effkernels.nn.fusible import is_untouched
from effkernels.nn.stack import run_blocks
from effkernels.optimize.swapped import BOUND, PROGRAMS, UNVERIFIED
from effkernels.optimize.swapping import verify

if TYPE_CHECKING:
    from effkernels.optimize.program import Program

_METHOD = "forward"


def in_stacks(
    x: Tensor, backend: str, blocks: Sequence[nn.Module], options: Sequence[Mapping[str, Any]] = ()
) -> Tensor:
    """Return what blocks make of x; arguments as of `effkernels.nn.stack.run_blocks`."""

    def arguments_of(block: nn.Module, height: int, width: int) -> dict[str, Any] | None:
        return _arguments(block, height, width, backend)

    return run_blocks(x, blocks, backend, arguments_of, options)


def block_program(module: nn.Module) -> Program | None:
    """Return the program of a module that is an MBConv block as a whole; None where it is none, or runs as written."""
    programs: dict[str, Program] = module.__dict__.get(PROGRAMS, {})
    program = programs.get(_METHOD)
    return None if program is None or program.block is None else program


def _arguments(module: nn.Module, height: int, width: int, backend: str) -> dict[str, Any] | None:
    """Return the entry of a block for x: (N, C, height, width); None where it has to be called."""
    program = block_program(module)
    if program is None or module.training or not is_untouched(module):
        return None
    if UNVERIFIED in module.__dict__ and not verify(module, _METHOD):
        return None
    parts = program.guard.take(module, BOUND + _METHOD)
    assert program.block is not None
    return None if parts is None else program.block((height, width), True, parts, backend)

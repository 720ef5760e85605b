"""Consecutive MBConv blocks of a network as one operator, `effkernels.ops.mbconv_stack`.

The operator plans which of the blocks share a launch; here only the modules decide: a block that has to be called, for
a hook or in training mode, runs by itself, and so does every other module.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from effkernels import ops
from effkernels.nn.fusible import calls_modules, is_untouched
from effkernels.nn.mbconv import MBConv
from effkernels.ops import backends


def run_in_stacks(blocks: nn.Module, x: Tensor) -> Tensor:
    """Return `blocks(x)`; consecutive `MBConv` among its modules run as one operator where a block would be one.

    Args:
        blocks: an `nn.Sequential` of blocks, or of such; anything else is called.
        x: (N, C, H, W).
    """
    if not calls_modules(x) and not x.is_cpu and _is_sequence(blocks):
        stacks = stacks_of(modules_of(blocks))
        if any(_takes_stack(stack, x) for stack in stacks):
            for stack in stacks:
                x = _run(stack, x)
            return x
    y: Tensor = blocks(x)
    return y


def modules_of(module: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that a call of nested `nn.Sequential` would call, in that order.

    One with something attached to it, such as a hook, stays as it is: it has to be called.
    """
    if _is_sequence(module):
        for child in module.children():
            yield from modules_of(child)
    else:
        yield module


def stacks_of(modules: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Divide modules that follow each other: `MBConv` of one backend share a list, everything else is by itself."""
    stacks: list[list[nn.Module]] = []
    open_for: str | None = None  # the backend of the last list, where it may grow
    for module in modules:
        backend = module.backend if isinstance(module, MBConv) and _is_block(module) else None
        if backend is not None and backend == open_for:
            stacks[-1].append(module)
        else:
            stacks.append([module])
        open_for = backend
    return stacks


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and is_untouched(module)


def _is_block(module: nn.Module) -> bool:
    return type(module) is MBConv and is_untouched(module)


def _takes_stack(stack: list[nn.Module], x: Tensor) -> bool:
    return len(stack) > 1 and isinstance(stack[0], MBConv) and backends.takes_block(x, stack[0].backend)


def _run(stack: list[nn.Module], x: Tensor) -> Tensor:
    first = stack[0]
    if _takes_stack(stack, x):
        arguments: list[dict[str, Any]] = []
        height, width = x.shape[2], x.shape[3]
        for block in stack:
            assert isinstance(block, MBConv)
            found = block.operator_arguments(height, width)
            if found is None:
                break
            arguments.append(found)
            height, width = _result_size(found, height, width)
        if len(arguments) > 1:
            assert isinstance(first, MBConv)
            x = ops.mbconv_stack(x, arguments, backend=first.backend)
            stack = stack[len(arguments) :]
            return _run(stack, x) if stack else x
        # The first block or the second has to be called.
        x = first(x)
        return _run(stack[1:], x)
    for module in stack:
        x = module(x)
    return x


def _result_size(arguments: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    """Return the size of the result of a block for x: (N, C, height, width)."""
    top, bottom, left, right = arguments["padding"]
    stride, dilation = arguments["stride"], arguments["dilation"]
    rows, columns = arguments["weight"].shape[2:]
    return (
        (height + top + bottom - dilation * (rows - 1) - 1) // stride + 1,
        (width + left + right - dilation * (columns - 1) - 1) // stride + 1,
    )

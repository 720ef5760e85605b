"""Consecutive MBConv blocks of a network as one operator, `effkernels.ops.mbconv_stack`.

The operator plans which of the blocks share a launch; here only the modules decide: a block that has to be called, for
a hook or in training mode, runs by itself, and so does every other module.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from effkernels import ops
from effkernels.nn.fusible import calls_modules, is_untouched
from effkernels.nn.mbconv import DepthwiseSeparable, MBConv
from effkernels.ops import backends

_Block = DepthwiseSeparable | MBConv
_BLOCKS = (DepthwiseSeparable, MBConv)


def run_in_stacks(blocks: nn.Module, x: Tensor) -> Tensor:
    """Return `blocks(x)`; consecutive blocks among its modules, with expansion or without, run as one operator where a
    block would be one.

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
    """Divide modules that follow each other: blocks of one backend share a list, everything else is by itself."""
    stacks: list[list[nn.Module]] = []
    open_for: str | None = None  # the backend of the last list, where it may grow
    for module in modules:
        backend = module.backend if isinstance(module, _BLOCKS) and _is_block(module) else None
        if backend is not None and backend == open_for:
            stacks[-1].append(module)
        else:
            stacks.append([module])
        open_for = backend
    return stacks


def _is_sequence(module: nn.Module) -> bool:
    return type(module) is nn.Sequential and is_untouched(module)


def _is_block(module: nn.Module) -> bool:
    return type(module) in _BLOCKS and is_untouched(module)


def _takes_stack(stack: list[nn.Module], x: Tensor) -> bool:
    return len(stack) > 1 and isinstance(stack[0], _BLOCKS) and backends.takes_block(x, stack[0].backend)


def _run(stack: list[nn.Module], x: Tensor) -> Tensor:
    first = stack[0]
    if len(stack) > 1 and isinstance(first, _BLOCKS):
        return run_blocks(x, stack, first.backend, lambda block, *size: cast(_Block, block).operator_arguments(*size))
    y: Tensor = first(x)
    return y


def run_blocks(
    x: Tensor,
    blocks: Sequence[nn.Module],
    backend: str,
    arguments_of: Callable[[nn.Module, int, int], dict[str, Any] | None],
    options: Sequence[Mapping[str, Any]] = (),
) -> Tensor:
    """Run blocks one after the other; those between two that have to be called are one operator.

    Args:
        x: (N, C, H, W), of the first block.
        blocks: modules that take one image and return one.
        backend: of every block.
        arguments_of: takes a block, and height and width of its input; returns its entry for
            `effkernels.ops.mbconv_stack`, or None where it has to be called.
        options: other arguments of each block where it is called; none: no block has any.
    """
    position = 0
    while position < len(blocks):
        arguments = _leading(x, blocks[position:], backend, arguments_of)
        if len(arguments) > 1:
            x = ops.mbconv_stack(x, arguments, backend=backend)
        else:  # this block or the next one has to be called
            x = blocks[position](x, **(options[position] if options else {}))
        position += max(len(arguments), 1)
    return x


def _leading(
    x: Tensor,
    blocks: Sequence[nn.Module],
    backend: str,
    arguments_of: Callable[[nn.Module, int, int], dict[str, Any] | None],
) -> list[dict[str, Any]]:
    """Return the entries of the first blocks, up to one that has to be called; arguments as of `run_blocks`."""
    arguments: list[dict[str, Any]] = []
    # A hook of a block before may have made anything of x.
    if isinstance(x, Tensor) and x.dim() == 4 and backends.takes_block(x, backend):
        height, width = x.shape[2], x.shape[3]
        for block in blocks:
            found = arguments_of(block, height, width)
            if found is None:
                break
            arguments.append(found)
            height, width = _result_size(found, height, width)
    return arguments


def _result_size(arguments: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    """Return the size of the result of a block for x: (N, C, height, width)."""
    top, bottom, left, right = arguments["padding"]
    stride, dilation = arguments["stride"], arguments["dilation"]
    rows, columns = arguments["weight"].shape[2:]
    return (
        (height + top + bottom - dilation * (rows - 1) - 1) // stride + 1,
        (width + left + right - dilation * (columns - 1) - 1) // stride + 1,
    )

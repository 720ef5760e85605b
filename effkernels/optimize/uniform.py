"""Check that a module without parameters computes the same for images of every size.

A probe sees a few sizes. What it finds holds for the others only where the forward cannot ask for the size: PyTorch's
own modules, straight-line code of PyTorch's functions, and the autograd functions in which libraries write activations.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator

import torch
from torch import fx, nn

from effkernels.optimize.tracing import trace_activation
from effkernels.optimize.unknown import Unknown

_ASKS_FOR_SIZE = frozenset(
    {"shape", "size", "dim", "ndim", "numel", "nelement", "stride", "is_contiguous", "device", "element_size", "nbytes"}
)


def is_uniform(module: nn.Module, may_reshape: bool = False) -> bool:
    """Return whether a module computes the same function of its input's values at every size.

    Args:
        module: without parameters and buffers.
        may_reshape: the size may be read where no decision hangs on it, as a mean over the image does.
    """
    if type(module).__module__.startswith("torch.nn."):
        return True
    try:
        graph = trace_activation(module)
    except Unknown:
        return all(_is_straight(code) for code in _codes_of(module))
    return may_reshape or not any(_asks_for_size(node) for node in graph.nodes)


def _asks_for_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _ASKS_FOR_SIZE
    return node.target is getattr and node.args[1] in _ASKS_FOR_SIZE


def _is_straight(code: types.CodeType) -> bool:
    """Return whether code has no branch and does not ask for a size."""
    return not _ASKS_FOR_SIZE & set(code.co_names) and not any(
        "JUMP" in instruction.opname or instruction.opname.startswith("STORE_ATTR")
        for instruction in dis.get_instructions(code)
    )


def _codes_of(module: nn.Module) -> Iterator[types.CodeType]:
    """Return the code of a forward and of the autograd functions and Python functions that it names."""
    seen: set[types.CodeType] = set()
    pending: list[object] = [type(module).forward]
    while pending:
        function = pending.pop()
        if isinstance(function, type) and issubclass(function, torch.autograd.Function):
            function = function.forward
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        yield code
        known = getattr(function, "__globals__", {})
        for name in code.co_names:
            found = known.get(name)
            is_torch = getattr(found, "__module__", "").startswith("torch") if found is not None else True
            if isinstance(found, types.FunctionType | type) and not is_torch:
                pending.append(found)

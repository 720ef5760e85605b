"""Values of attributes in a form that can be kept and compared later, after the attribute was changed in place."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SCALARS = (bool, int, str, bytes, complex, type(None))
_BY_IDENTITY = (
    *(type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType),
    *(nn.Module, torch.dtype, torch.device, torch.Generator),
)
_DEPTH = 4  # of lists in lists and of objects in objects


class Same:
    """An object of which only the identity counts. It is copied and pickled with what it belongs to."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Same, (self.value,)


def freeze(value: Any, of_tensor: Callable[[Tensor], Any] = Same, depth: int = _DEPTH) -> Any:
    """Return a value that compares equal to another frozen one where both hold the same.

    Args:
        value: anything.
        of_tensor: what counts of a tensor.
        depth: how far to look into containers and objects; below that identity counts.
    """
    if isinstance(value, float):
        return (float, repr(value))  # a NaN equals itself
    if isinstance(value, _SCALARS):
        return (type(value), value)
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, _BY_IDENTITY) or depth == 0:
        return Same(value)
    if isinstance(value, list | tuple):
        return (type(value), tuple(freeze(one, of_tensor, depth - 1) for one in value))
    if isinstance(value, dict):
        items = ((freeze(key, of_tensor, depth - 1), freeze(one, of_tensor, depth - 1)) for key, one in value.items())
        return (type(value), tuple(items))
    if isinstance(value, set | frozenset):
        return (type(value), frozenset(freeze(one, of_tensor, depth - 1) for one in value))
    attributes = getattr(value, "__dict__", None)
    if attributes is None or depth == 1:  # its attributes would be compared as one dict, which is not the object
        return Same(value)
    return (type(value), freeze(dict(attributes), of_tensor, depth - 1))


def mutable_parts(value: Any, depth: int = _DEPTH) -> list[Any]:
    """Return the lists, dicts and sets in a value, those that are objects' attributes included."""
    if depth == 0 or isinstance(value, (*_SCALARS, float, Tensor, *_BY_IDENTITY)):
        return []
    if isinstance(value, dict):
        inside = list(value.values())
        return [value, *(part for one in inside for part in mutable_parts(one, depth - 1))]
    if isinstance(value, list | set | frozenset | tuple):
        own = [value] if isinstance(value, list | set) else []
        return [*own, *(part for one in value for part in mutable_parts(one, depth - 1))]
    attributes = getattr(value, "__dict__", None)
    return [] if attributes is None else mutable_parts(attributes, depth - 1)

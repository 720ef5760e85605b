"""Copies of a module on which a forward of unknown effect may run.

A forward is anybody's code: it may keep an attribute, fill a cache, count in a buffer. So nothing here is ever run on
the user's modules. A twin has the same structure, attributes of its own and buffers of its own, shares the parameters,
and has no hooks; what a forward wrote to it can be found afterwards.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from effkernels.optimize.frozen import freeze
from effkernels.optimize.swapped import OWN_PREFIX, original_class

HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith(("_hooks", "_with_kwargs", "_always_called")))
_SHARED = (str, bytes, int, float, complex, bool, type(None), type, types.FunctionType, types.BuiltinFunctionType,
           types.ModuleType, torch.dtype, torch.device)  # fmt: skip

Mapped: TypeAlias = Callable[[Tensor], Tensor]


class Twins:
    """A twin of `root` and of everything below it.

    Args:
        root: what is copied; it is not changed and nothing of it is called.
        plain: give the modules of `optimize_` their own forward back.
        convert: what becomes of a tensor, for a twin in another dtype or on another device; None: parameters are shared
            and every other tensor is cloned.
        share: share every tensor.
        watched: remember what a forward could write, for `written`.
        cls: the class of a twin, by that of the original.

    Attributes:
        root: the twin of `root`.
        originals: by id of a twin, what it is a twin of.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        plain: bool = True,
        convert: Mapped | None = None,
        share: bool = False,
        watched: bool = False,
        cls: Callable[[type[nn.Module]], type[nn.Module]] | None = None,
    ) -> None:
        self._plain = plain
        self._convert = convert
        self._share = share
        self._cls = cls
        self._made: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}
        self._keep: list[Any] = []  # ids stay taken as long as their objects live
        self.originals: dict[int, nn.Module] = {}
        self.root = self._twin(root)
        self._before: dict[int, dict[str, Any]] = {}
        if watched:
            self.settle()

    def settle(self) -> None:
        """Take the twins as they are now for unwritten."""
        self._before = {id(twin): _state(twin) for twin in self._made.values()}

    def of(self, module: nn.Module) -> nn.Module:
        """Return the twin of a module below the root."""
        return self._made[id(module)]

    def written(self, modules: Iterable[nn.Module] | None = None) -> str:
        """Return the name of something that a forward wrote to a twin: "" where it wrote nothing.

        Args:
            modules: twins to look at; None: all.
        """
        for twin in self._made.values() if modules is None else modules:
            before, now = self._before[id(twin)], _state(twin)
            if before != now:
                names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
                return f"{names[0]!r} of {type(self.originals[id(twin)]).__name__}"
        return ""

    def _twin(self, module: nn.Module) -> nn.Module:
        made = self._made.get(id(module))
        if made is not None:
            return made
        if isinstance(module, torch.jit.ScriptModule):
            return module  # compiled code cannot be copied piece by piece
        cls = original_class(type(module)) if self._plain else type(module)
        twin: nn.Module = object.__new__(cls if self._cls is None else self._cls(cls))
        self._made[id(module)] = twin
        self.originals[id(twin)] = module
        for name, value in module.__dict__.items():
            if name.startswith(OWN_PREFIX) and (self._plain or "bound" in name):
                continue
            if name in HOOKS:
                twin.__dict__[name] = type(value)()
            elif name == "_parameters":
                twin.__dict__[name] = {key: self._parameter(one) for key, one in value.items()}
            elif name == "_modules":
                twin.__dict__[name] = {key: None if one is None else self._twin(one) for key, one in value.items()}
            else:  # buffers too
                twin.__dict__[name] = self._copy(value)
        return twin

    def _parameter(self, parameter: Any) -> Any:
        if parameter is None or self._convert is None:
            return parameter
        converted = self._tensor(parameter)
        if isinstance(converted, nn.Parameter):
            return converted
        self._tensors[id(parameter)] = nn.Parameter(converted, requires_grad=False)
        return self._tensors[id(parameter)]

    def _tensor(self, tensor: Tensor) -> Tensor:
        if self._share:
            return tensor
        if id(tensor) not in self._tensors:
            convert = torch.clone if self._convert is None else self._convert
            self._tensors[id(tensor)] = convert(tensor.detach())
            self._keep.append(tensor)
        return self._tensors[id(tensor)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, _SHARED):
            return value
        if isinstance(value, nn.Parameter):
            return self._parameter(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._twin(value)
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(one) for one in value)
        if type(value) is dict:
            return {key: self._copy(one) for key, one in value.items()}
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self._twin(value.__self__))
        try:
            return copy.copy(value)
        except Exception:  # locks, process groups and the like
            return value


def double(tensor: Tensor) -> Tensor:
    """Return a floating tensor in float64; any other as a copy."""
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape, strides and dtype without memory."""
    return torch.empty_like(tensor, device="meta")


def _state(twin: nn.Module) -> dict[str, Any]:
    """Return what a forward could have written: attributes, and for tensors which they are and how often written."""
    found = {
        name: freeze(value, _tensor_state)
        for name, value in twin.__dict__.items()
        if name not in HOOKS and name not in ("_modules", "_parameters", "_buffers") and not name.startswith(OWN_PREFIX)
    }
    for kind in ("_buffers", "_parameters"):
        for name, tensor in twin.__dict__[kind].items():
            found[name] = freeze(tensor, _tensor_state)
    return found


def _tensor_state(tensor: Tensor) -> Any:
    return (id(tensor), None if tensor.is_inference() else tensor._version)

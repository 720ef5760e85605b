"""Swapping a module's class for one that runs its program, in place, and back.

The module stays the object that it was, with its name, its parameters and its hooks; `isinstance` holds as before,
because the new class is derived from the old one. What the program needs lies in the instance as plain data, so the
module can be copied and pickled like any other.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from effkernels import backends
from effkernels.optimize.program import Program
from effkernels.optimize.watching import Watch, hooks_registered

PROGRAMS = "_effkernels_programs"
"""The attribute of a swapped module with its programs by method name."""
_WATCH = "_effkernels_watch_"  # with the name of a method: the attribute with the watch over its program's modules


def is_swapped(module: nn.Module) -> bool:
    """Whether a module runs programs."""
    return issubclass(type(module), _Swapped)


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a swapped module had."""
    return cls._effkernels_original if issubclass(cls, _Swapped) else cls


def swap(module: nn.Module, programs: Mapping[str, Program]) -> None:
    """Let `module` run `programs`, by name of the method that each replaces."""
    module.__dict__[PROGRAMS] = dict(programs)
    module.__class__ = swapped_class(type(module), tuple(sorted(programs)))


def unswap(module: nn.Module) -> int:
    """Take a swap back; returns how many blocks the module ran fused."""
    programs: dict[str, Program] = module.__dict__.pop(PROGRAMS, {})
    for name in programs:
        module.__dict__.pop(_WATCH + name, None)
    module.__class__ = original_class(type(module))
    return sum(program.fused for program in programs.values())


# One class for all instances of a class, as `isinstance` and torch.compile expect.
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


class _Swapped:
    """What a swapped class has besides the original: programs, and the way to be copied and pickled."""

    _effkernels_original: type[nn.Module]
    _effkernels_methods: tuple[str, ...]
    _effkernels_programs: Mapping[str, Program] = {}  # for an instance that somebody's code makes of the class

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time and cannot be found by its name: the original and the methods say what it is.
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore[assignment]
        original = (self._effkernels_original, self._effkernels_methods)
        return _new, (*original, *reduced[1][1:]), *reduced[2:]


def swapped_class(original: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """The class derived from `original` in which each of `methods` runs its program where one holds."""
    known = _CLASSES.get((original, methods))
    if known is not None:
        return known
    members: dict[str, Any] = {
        "_effkernels_original": original,
        "_effkernels_methods": methods,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        **{name: _method(name, getattr(original, name)) for name in methods},
    }
    made = _CLASSES[original, methods] = type(original.__name__, (_Swapped, original), members)
    return made


def _new(original: type[nn.Module], methods: tuple[str, ...], *arguments: Any) -> Any:
    cls = swapped_class(original, methods)
    return cls.__new__(cls, *arguments)


def _parts(module: nn.Module, name: str, program: Program) -> tuple[Any, ...] | None:
    """What the program takes out of its modules; None where they are not what it was made for."""
    watch: Watch | None = module.__dict__.get(_WATCH + name)
    parts = None if watch is None else watch.parts(module)
    if parts is None:
        hooks = hooks_registered()
        parts = program.look(module)
        if parts is not None:
            with contextlib.suppress(KeyError):
                module.__dict__[_WATCH + name] = Watch(module, program.watched, program.parts, hooks)
    return parts


def _method(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        program: Program | None = self._effkernels_programs.get(name)
        if program is not None and not self.training:
            x = args[0] if len(args) == 1 and not kwargs else program.input_of(args, kwargs)
            parts = program.look(self) if torch.compiler.is_compiling() else _parts(self, name, program)
            if parts is not None:
                if program.backend == "auto":
                    result = program.compute(self, x, parts)
                else:
                    with backends.backend(program.backend):
                        result = program.compute(self, x, parts)
                if result is not None:
                    return result
        return original(self, *args, **kwargs)

    return fused

"""Swapping a module's class for one that runs its program, in place, and back.

The module stays the object that it was, with its name, its parameters and its hooks; `isinstance` holds as before,
because the new class is derived from the old one. What the program needs is in the instance as plain data, so the
module can be copied and pickled like any other.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effkernels.optimize.swapped import BOUND, OWN_PREFIX, PROGRAMS, TRAINING, UNVERIFIED, original_class

if TYPE_CHECKING:
    from effkernels.optimize.program import Program
    from effkernels.optimize.training import TrainingProgram


def swap(
    module: nn.Module,
    programs: Mapping[str, Program],
    unverified: Mapping[str, tuple[tuple[int, ...], ...]],
    training: Mapping[str, TrainingProgram],
) -> None:
    """Let `module` run programs.

    Args:
        module: changed in place.
        programs: by name of the method that each replaces.
        unverified: shapes to compare a program with its method on at its first use, by name of the method.
        training: programs for training mode, by name of the method; others run as written there.
    """
    module.__dict__[PROGRAMS] = dict(programs)
    if training:
        module.__dict__[TRAINING] = dict(training)
    if unverified:
        module.__dict__[UNVERIFIED] = dict(unverified)
    module.__class__ = swapped_class(type(module), tuple(sorted(programs)))


def unswap(module: nn.Module) -> int:
    """Take a swap back; returns how many blocks the module ran fused.

    Where somebody has since given the module a class derived from the swapped one (as parametrizations do), it keeps
    that: without programs it runs the original forward.
    """
    programs: dict[str, Program] = module.__dict__.get(PROGRAMS, {})
    for name in [name for name in module.__dict__ if name.startswith(OWN_PREFIX)]:
        del module.__dict__[name]
    if original_class(type(module)) is not type(module):
        module.__class__ = original_class(type(module))
    return sum(program.fused for program in programs.values())


# One class for all instances of a class, as `isinstance` and torch.compile expect.
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


class _Swapped:
    """The members of a swapped class besides the original's: programs, and the way to be copied and pickled."""

    # Without annotations, which torch.jit.script would read.
    _effkernels_programs = {}  # type: ignore[var-annotated] # noqa: RUF012  for an instance that somebody's code makes of the class
    _effkernels_training = {}  # type: ignore[var-annotated] # noqa: RUF012  as above, and for a module without any

    def _effkernels_set_recompute(self, recompute: Any) -> None:
        """Choose what the programs for training save, for `effkernels.nn.set_recompute`."""
        for program in self._effkernels_training.values():
            program.recompute = recompute

    def __prepare_scriptable__(self) -> Any:
        """Return what torch.jit.script compiles instead of this module: the same without programs."""
        from effkernels.optimize.twins import Twins

        return Twins(self, share=True).root  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time and cannot be found by its name: the original and the methods say what it is.
        reduced: tuple[Any, ...] = super().__reduce_ex__(max(2, int(protocol)))  # type: ignore[assignment]
        cls: Any = type(self)
        if original_class(cls) is cls:  # derived later from a swapped class: a class of its own
            return reduced
        return _new, (cls._effkernels_original, cls._effkernels_methods, *reduced[1][1:]), *reduced[2:]


def swapped_class(original: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """Return the class derived from `original` in which each of `methods` runs its program where one holds."""
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


def _method(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    key = BOUND + name

    @functools.wraps(original)
    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        program: Program | None = self._effkernels_programs.get(name)
        if self.training:
            trained: TrainingProgram | None = self._effkernels_training.get(name)
            if trained is not None and not _wants_plain():
                result = trained.run(self, args, kwargs)
                if result is not None:
                    return result
        elif program is not None:
            x = args[0] if len(args) == 1 and not kwargs else program.input_of(args, kwargs)
            if isinstance(x, Tensor) and not _wants_plain() and (UNVERIFIED not in self.__dict__ or verify(self, name)):
                parts = program.guard.take(self, key)
                if parts is not None:
                    result = program.compute(self, x, parts)
                    if result is not None:
                        return result
        return original(self, *args, **kwargs)

    return fused


def _wants_plain() -> bool:
    """Return whether operations are observed: torch.jit.trace, the ONNX exporters, a transform of torch.func."""
    if _is_compiling():  # the second question takes a microsecond, and dynamo cannot trace the others
        return not torch.compiler.is_dynamo_compiling() and torch.onnx.is_in_onnx_export()
    return _is_tracing() or _in_transform()


_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_in_transform = torch._C._are_functorch_transforms_active


def verify(module: nn.Module, name: str) -> bool:
    """Compare a program with the original forward, which could not be done before: whether it may be used.

    `optimize_` had no weights to compare with, on the meta device or before any were loaded. Until there are some, and
    while torch.compile or torch.export traces, the original runs.
    """
    pending: dict[str, tuple[tuple[int, ...], ...]] = module.__dict__[UNVERIFIED]
    if name not in pending:
        return True
    if torch.compiler.is_compiling():
        return False
    from effkernels.optimize.verifying import difference, undisturbed

    program = module.__dict__[PROGRAMS][name]
    with undisturbed(module):
        problem = difference(module, name, program, pending[name])
    if problem is None:
        return False
    if problem:
        warnings.warn(f"{type(module).__name__}.{name} runs as written: {problem}", RuntimeWarning, stacklevel=4)
        module.__dict__[PROGRAMS] = {one: kept for one, kept in module.__dict__[PROGRAMS].items() if one != name}
    left = {one: shapes for one, shapes in pending.items() if one != name}
    if left:
        module.__dict__[UNVERIFIED] = left
    else:
        del module.__dict__[UNVERIFIED]
    return not problem

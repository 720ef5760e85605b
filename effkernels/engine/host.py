"""Recording a forward on the CPU: the calls of the compiled kernels alone, to be repeated without Python between them.

What CUDA graphs are to a GPU. A network's forward becomes pieces of kernel calls (csrc/ops/recording.h) with the calls
of other operators between them, all on tensors that stay where they are. At batch 1 the kernels of EfficientNet-B0 take
less than two thirds of the time of a forward that goes through modules and the dispatcher.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_OURS = "effkernels"


class NotRecordableError(RuntimeError):
    """A forward does something that cannot be repeated on the same tensors."""


def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Do `work` once, and record it.

    Args:
        work: a forward on tensors that stay where they are; it is called once before, to let libraries settle.

    Returns:
        What does it again, and what it returned: the same tensors, which every repetition overwrites.

    Raises:
        NotRecordableError: it reads values back, or makes tensors that do not depend on its input alone.
        RuntimeError: a kernel would have to copy its input into another layout.
    """
    work()
    calls = torch.ops.effkernels
    recorder = _Recorder()
    calls.cpu_record("begin")
    try:
        with recorder:
            output = work()
        recorder.cut()
    finally:
        calls.cpu_record("end")
    steps = tuple(recorder.steps)

    def replay() -> None:
        for step in steps:
            step()

    weakref.finalize(replay, _forget, tuple(recorder.pieces))
    return replay, output


def _forget(pieces: tuple[int, ...]) -> None:
    for piece in pieces:
        torch.ops.effkernels.cpu_forget(piece)


class _Recorder(TorchDispatchMode):
    """Sees every operator that a forward calls, below autograd and below composite functions."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], object]] = []
        self.pieces: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and note it where it is not one of ours, whose kernels note themselves."""
        kwargs = kwargs or {}
        if func.namespace == _OURS:
            return func(*args, **kwargs)
        results = func(*args, **kwargs)
        if _is_view(func):
            return results
        leaves = pytree.tree_leaves(results)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise NotRecordableError(f"{func} returns {type(results).__name__} instead of tensors")
        self.cut()
        self.steps.append(_Call(func, args, kwargs, results))
        return results

    def cut(self) -> None:
        """End the piece of our kernels that stands before what comes next."""
        piece = torch.ops.effkernels.cpu_record("cut")
        if piece:
            self.pieces.append(piece)
            self.steps.append(lambda: torch.ops.effkernels.cpu_replay.default(piece))


class _Call:
    """Another operator's call, repeated on the same tensors; what it returns goes where its first results lie."""

    def __init__(self, func: Any, args: Any, kwargs: Any, results: Any) -> None:
        self._func = func
        self._args = args
        self._kwargs = kwargs
        self._results = [leaf for leaf in pytree.tree_leaves(results)]
        self._writes_input = func._schema.is_mutable

    def __call__(self) -> None:
        found = self._func(*self._args, **self._kwargs)
        if not self._writes_input:
            for into, result in zip(self._results, pytree.tree_leaves(found), strict=True):
                into.copy_(result)


def _is_view(func: Any) -> bool:
    """Whether every result of an operator lies in the memory of an argument that it does not write."""
    results = func._schema.returns
    return bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)

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


class Recording:
    """A forward on tensors that stay where they are, done once and recorded.

    Args:
        work: the forward; it is called once before, to let libraries settle.

    Attributes:
        output: what it returned: the same tensors, which every replay overwrites.
        result_bytes: of everything computed on the way that stays, results of kernels that overwrite each other once.
        weight_bytes: of weights as the kernels lay them out.

    Raises:
        NotRecordableError: it calls none of our kernels, reads values back, or returns something else than tensors on
            the way.
        RuntimeError: a kernel would have to copy its input into another layout.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        work()
        ours = torch.ops.effkernels
        recorder = _Recorder()
        ours.cpu_record("begin")
        try:
            with recorder:
                self.output = work()
            recorder.cut()
        finally:
            ours.cpu_record("end")
        weakref.finalize(self, _forget, tuple(recorder.pieces))
        if not recorder.pieces:
            raise NotRecordableError("it calls no kernel of effkernels")
        self._steps = tuple(recorder.steps)
        kernels: list[int] = ours.cpu_recorded_bytes(recorder.pieces[-1])
        self.result_bytes = kernels[0] + recorder.other_bytes
        self.weight_bytes = kernels[1]

    def replay(self) -> None:
        """Do it again."""
        for step in self._steps:
            step()


def _forget(pieces: tuple[int, ...]) -> None:
    for piece in pieces:
        torch.ops.effkernels.cpu_forget(piece)


class _Recorder(TorchDispatchMode):
    """Sees every operator that a forward calls, below autograd and below composite functions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Callable[[], object]] = []
        self.pieces: list[int] = []
        self.other_bytes = 0  # results of other operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator, and note it where it is not one of ours, whose kernels note themselves."""
        kwargs = kwargs or {}
        if func.namespace == _OURS:
            return func(*args, **kwargs)
        results = func(*args, **kwargs)
        leaves = pytree.tree_leaves(results)
        if not func._schema.is_mutable and _lie_in(leaves, (args, kwargs)):  # views
            return results
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise NotRecordableError(f"{func} returns {type(results).__name__} instead of tensors")
        self.cut()
        self.steps.append(_Call(func, args, kwargs, results))
        if not func._schema.is_mutable:
            self.other_bytes += sum(leaf.nbytes for leaf in leaves)
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
        self._results = pytree.tree_leaves(results)
        self._writes_input = func._schema.is_mutable

    def __call__(self) -> None:
        found = self._func(*self._args, **self._kwargs)
        if not self._writes_input:
            for into, result in zip(self._results, pytree.tree_leaves(found), strict=True):
                into.copy_(result)


def _lie_in(results: list[Any], arguments: Any) -> bool:
    """Whether all results are tensors in the memory of the arguments."""
    known = {_memory(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return bool(results) and all(isinstance(one, Tensor) and _memory(one) in known for one in results)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

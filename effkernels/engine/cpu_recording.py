"""Recording a forward on the CPU: the calls of the compiled kernels alone, to be repeated without Python between them.

The CPU's counterpart of CUDA graphs. A network's forward becomes pieces of kernel calls (csrc/ops/recording.h) with the
calls of other operators between them, all on tensors that stay where they are. At batch 1 the kernels of
EfficientNet-B0 take less than two thirds of the time of a forward that goes through modules and the dispatcher.

A recording is right for every input: while it is made, the forward gets tensors without values (`RecordedTensor`), so
that no branch and no shape of it can depend on them, and operators whose result's shape depends on values are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from effkernels._recorded_tensor import NotRecordableError, RecordedTensor, values_of
from effkernels.engine.memory import under

_OURS = "effkernels"
_TRIALS = 3
_SCALES = (1.0, 1e3, 30.0, 1e-2)


class Recording:
    """A forward on tensors that stay where they are, done once and recorded.

    Args:
        forward: it is called once before, to let libraries settle.
        images: what it is given; replays read their values there.

    Attributes:
        output: what it returned: the same tensors, which every replay overwrites.
        result_bytes: of everything computed on the way that stays, results of kernels that overwrite each other once.
        weight_bytes: of weights packed for the kernels.

    Raises:
        NotRecordableError: it calls none of our kernels, what it does depends on values, or a kernel would have to
            copy its input into another layout.
    """

    def __init__(self, forward: Callable[[Tensor], Any], images: Tensor) -> None:
        forward(images)
        self._native = torch.ops.effkernels.cpu_recording()
        recorder = _Recorder(self._native)
        given = recorder.wrap(images)
        try:
            output = under(recorder, forward, (given,))
        except NotRecordableError:
            raise
        except Exception as error:
            raise NotRecordableError(f"it raises {type(error).__name__} while it is recorded: {error}") from error
        recorder.cut()
        if not recorder.pieces:
            raise NotRecordableError("it calls no kernel of effkernels")
        self.output = values_of(output)
        self._steps = tuple(recorder.steps)
        self._pieces = recorder.pieces
        kernels: list[int] = torch.ops.effkernels.cpu_recording_bytes(self._native)
        self.result_bytes = kernels[0] + recorder.other_bytes
        self.weight_bytes = kernels[1]

    def replay(self) -> None:
        """Do it again.

        Raises:
            NotRecordableError: an operator returned other shapes than before; what was computed is not valid.
            Exception: of an operator that does not accept the values that it got.
        """
        for step in self._steps:
            step()

    def layers(self, rounds: int) -> list[tuple[str, float]]:
        """Return each recorded kernel with its sizes, and the shortest of its times in `rounds` replays in seconds.

        The calls of other operators between the kernels are not made.

        Raises:
            RuntimeError: `rounds` is less than 1.
        """
        ours = torch.ops.effkernels
        found: list[tuple[str, float]] = []
        for piece in range(1, self._pieces + 1):
            lines = ours.cpu_recording_layers(self._native, piece).splitlines()
            times = ours.cpu_recording_times(self._native, piece, rounds)
            found += zip(lines, (time * 1e-9 for time in times), strict=True)
        return found


def trial_images(images: Tensor) -> Iterator[Tensor]:
    """Return values to try a recording on: noise from 0.01 to several thousand, dark and bright, new for each trial."""
    rows = torch.arange(len(images))
    for trial in range(_TRIALS):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(trial))
        scale = torch.tensor(_SCALES)[(rows + trial) % len(_SCALES)]
        offset = (rows + trial) % 3 - 1
        yield (noise + offset[:, None, None, None]) * scale[:, None, None, None]


class _Reads(TorchDispatchMode):
    """Refuses operators whose results, or whose results' shapes, depend on values in a way that Python sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator that does not read values."""
        _refuse_reads(func, args)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Sees every operator that a forward calls, below autograd and below composite functions."""

    def __init__(self, native: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._native = native
        self.steps: list[Callable[[], object]] = []
        self.pieces = 0
        self.other_bytes = 0  # results of other operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator and note it; one of ours with the recording, into which its kernels note themselves."""
        given = (args, kwargs or {})
        args, kwargs = values_of(given)
        recorded = getattr(torch.ops.effkernels, f"recorded_{func._opname}", None) if func.namespace == _OURS else None
        if recorded is not None:
            results = recorded(self._native, *args, **kwargs)
        else:
            results = self._call(func, args, kwargs, given)
        known = {id(leaf._value): leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, RecordedTensor)}
        return pytree.tree_map_only(
            Tensor, lambda leaf: known[id(leaf)] if id(leaf) in known else self.wrap(leaf), results
        )

    def wrap(self, tensor: Tensor) -> RecordedTensor:
        """Return the tensor that the forward sees in place of `tensor`."""
        return RecordedTensor(tensor, self)

    def cut(self) -> None:
        """End the piece of our kernels that comes before the next step."""
        piece = torch.ops.effkernels.cpu_recording_cut(self._native)
        if piece:
            self.pieces += 1
            self.steps.append(_Piece(self._native, piece))

    def _call(self, func: Any, args: Any, kwargs: Any, given: Any) -> Any:
        """Call another operator, and note it unless it only makes views."""
        _refuse_reads(func, args)
        if func is torch.ops.aten.detach_.default:  # as torch.tensor does; nothing to be repeated
            return args[0]
        if torch.Tag.inplace_view in func.tags:
            raise NotRecordableError(f"{func} changes more of a tensor in place than its values")
        stand_ins = list(_written(func, *given)) if func._schema.is_mutable else []
        if not all(isinstance(tensor, RecordedTensor) for tensor in stand_ins):
            raise NotRecordableError(f"{func} writes to a tensor that is not its own, such as a buffer of the model")
        written = values_of(stand_ins)
        before = [_memory_of(tensor) for tensor in written]
        # What a composite operator is made of may read values.
        composite = func._can_decompose()
        results = under(_Reads(), func.decompose, args, kwargs) if composite else func(*args, **kwargs)
        leaves = [leaf for leaf in pytree.tree_leaves(results) if leaf is not None]
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or not (leaves or written):
            raise NotRecordableError(f"{func} returns {type(results).__name__} instead of tensors")
        if [_memory_of(tensor) for tensor in written] != before:
            raise NotRecordableError(f"{func} replaces the memory of a tensor")
        if written or not _lie_in(leaves, (args, kwargs)):
            self.cut()
            self.steps.append(_Call(func, args, kwargs, leaves, bool(written)))
            self.other_bytes += 0 if written else sum(leaf.nbytes for leaf in leaves)
        return results


class _Piece:
    """Kernel calls of ours without anything between them."""

    def __init__(self, native: Tensor, number: int) -> None:
        self._native = native
        self._number = number

    def __call__(self) -> None:
        torch.ops.effkernels.cpu_recording_replay.default(self._native, self._number)


class _Call:
    """Another operator's call, repeated on the same tensors; what it returns goes to where its first results are."""

    def __init__(self, func: Any, args: Any, kwargs: Any, results: list[Tensor], writes: bool) -> None:
        self._func = func
        self._args = args
        self._kwargs = kwargs
        self._results = results
        self._shapes = [result.shape for result in results]
        self._writes = writes

    def __call__(self) -> None:
        found = [leaf for leaf in pytree.tree_leaves(self._func(*self._args, **self._kwargs)) if leaf is not None]
        if [leaf.shape for leaf in found] != self._shapes:
            raise NotRecordableError(f"{self._func} returns shapes that depend on values")
        if not self._writes:
            for into, result in zip(self._results, found, strict=True):
                into.copy_(result)


def _refuse_reads(func: Any, args: Any) -> None:
    """Refuse an operator that returns values to Python, or whose result's shape depends on them.

    Raises:
        NotRecordableError: it does.
    """
    if torch.Tag.data_dependent_output in func.tags:
        raise NotRecordableError(f"{func} reads values")
    if torch.Tag.dynamic_output_shape in func.tags and not _is_index_by_integers(func, args):
        raise NotRecordableError(f"the shape of what {func} returns depends on values")


def _is_index_by_integers(func: Any, args: Any) -> bool:
    """Return whether it is `x[indices]` without masks: the one operator whose tag applies only to some arguments."""
    indices = args[1] if func is torch.ops.aten.index.Tensor else [None]
    masks = (torch.bool, torch.uint8)
    return func is torch.ops.aten.index.Tensor and not any(i is not None and i.dtype in masks for i in indices)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Return the tensors that an operator writes to, as its schema says."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def _memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes if a tensor's memory, shape or strides change."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride())


def _lie_in(results: list[Any], arguments: Any) -> bool:
    """Return whether all results are tensors in the memory of the arguments."""
    known = {_memory(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)}
    return bool(results) and all(isinstance(one, Tensor) and _memory(one) in known for one in results)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

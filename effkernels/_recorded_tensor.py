"""The tensors of a forward that is being recorded: everything that a tensor has, but no values that could be read."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class NotRecordableError(RuntimeError):
    """A forward does something that cannot be repeated on the same tensors."""


class RecordedTensor(Tensor):
    """Represents a tensor while a forward is recorded.

    Shape, strides, dtype and device are those of the tensor; its memory cannot be reached, so nothing that Python does
    (a branch, a shape, an edit through numpy, work in another thread) can depend on values that differ at a replay.
    Operators take it as long as the recorder sees them. When the recorder is gone, it acts as the tensor itself.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _value: Tensor
    _recorder: weakref.ref[Any]

    @staticmethod
    def __new__(cls, value: Tensor, recorder: Any) -> RecordedTensor:
        """Return a tensor that represents `value` and reports its operators to `recorder`."""
        with torch._C._InferenceMode(value.is_inference()):  # a view of a weight is none of inference mode
            made: RecordedTensor = Tensor._make_wrapper_subclass(
                cls,
                value.shape,
                strides=value.stride(),
                storage_offset=value.storage_offset(),
                dtype=value.dtype,
                layout=value.layout,
                device=value.device,
            )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made._value = value
        made._recorder = weakref.ref(recorder)
        return made

    def __init__(self, value: Tensor, recorder: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An operator that the recorder did not see, of another thread or after the recording."""
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, RecordedTensor) and leaf._recorder() is not None:
                raise NotRecordableError(f"{func} is called where it cannot be recorded, such as in another thread")
        return func(*values_of(args), **values_of(kwargs or {}))


def values_of(tree: Any) -> Any:
    """Return the same structure with the tensors themselves in place of those that represent them."""
    return pytree.tree_map_only(RecordedTensor, lambda leaf: leaf._value, tree)

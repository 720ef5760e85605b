"""Count the memory that a model needs, where its tensors are created."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by name, those that a state_dict leaves out as well."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory that tensors use, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def under(mode: TorchDispatchMode, function: Callable[..., Any], args: Any, kwargs: Any = None) -> Any:
    """Call a function under a mode, which ends even after an interrupt.

    `with mode` runs Python code before and after its block is protected; the two calls here are C, between which and
    the `try` Python looks for no interrupt.
    """
    try:
        torch._C._push_on_torch_dispatch_stack(mode)
        return function(*args, **(kwargs or {}))
    finally:
        torch._C._pop_torch_dispatch_stack(None)


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory of tensors that operators return, until it is given back."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:  # others have no storage of their own
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address == 0 or address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        # The Python object of a storage lives as long as its memory.
        weakref.finalize(storage, self._forget, address, size).atexit = False

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def peak_bytes(forward: Callable[[Tensor], Any], images: Tensor, weights: Iterable[Tensor]) -> tuple[Any, int]:
    """Return the result of `forward`, and the most bytes of tensors alive while it ran: its result, not its input.

    Counted are the results of operators. What an operator allocates for itself and gives back is not, nor is what an
    allocator rounds up to.

    Args:
        weights: tensors that were there before, which are not counted.
    """
    count = _LiveBytes([images, *weights])
    result = under(count, forward, (images,))
    return result, count.peak

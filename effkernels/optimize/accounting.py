"""Count the launches of a forward on a GPU and the bytes they move, block by block, with `effkernels.plan`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effkernels import _library
from effkernels.ops.backends import DTYPES
from effkernels.optimize.twins import Twins, on_meta
from effkernels.plan import gpus
from effkernels.plan.launches import Call, plan_groups, record_calls


@dataclass(frozen=True)
class Forward:
    """One forward on the meta device.

    Attributes:
        calls: of operators that launch something.
        shapes: of the first argument of each module's first call, by path.
    """

    calls: Sequence[Call]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Cost:
    """Launches and bytes of a part of a forward."""

    launches: int
    bytes: int


def try_forward(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[Forward | None, str]:
    """Run one forward of an image of that size on the meta device, whatever device the model is on.

    Returns:
        The forward, or None and the reason: the model does not take such an image, or holds tensors of its own.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = torch.empty(1, *input_size, dtype=dtype, device="meta")
    try:
        twin = Twins(model, plain=False, convert=on_meta).root
        shapes: dict[str, tuple[int, ...]] = {}
        with _watching(twin, shapes):
            calls = record_calls(twin, images)
    except Exception as error:  # the model is anybody's, and this only decides whether there are figures
        line = str(error).strip().partition("\n")[0]
        return None, f"launches and bytes are not counted: {type(error).__name__}: {line}"
    return Forward(calls, shapes), ""


@contextlib.contextmanager
def _watching(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> Iterator[None]:
    """Fill in the shape of what each module is called with first; modules of other threads do not count."""
    paths = {id(module): path for path, module in model.named_modules()}
    thread = threading.get_ident()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        path = paths.get(id(module)) if threading.get_ident() == thread else None
        if path is not None and args and isinstance(args[0], Tensor):
            shapes.setdefault(path, tuple(args[0].shape))

    handle = nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield
    finally:
        handle.remove()


def costs_of(forward: Forward | None, groups: Sequence[frozenset[str]]) -> list[Cost | None]:
    """Return the cost of each group of modules (by path, what is below included); None if it is not known.

    A launch that several blocks share counts at the first of them; its bytes count where they belong.
    """
    if forward is None or not _library.is_loaded() or any(call.dtype not in DTYPES for call in forward.calls):
        return [None] * len(groups)
    gpu = gpus.find(gpus.DEFAULT_GPU)
    launches, moved = [0] * len(groups), [0] * len(groups)
    owner = {path: index for index, paths in enumerate(groups) for path in paths}
    for call in forward.calls:
        for parts, planned in plan_groups(call, gpu, allow_tf32=True):
            for position, part in enumerate(parts):
                index = _owner(part.layer, owner)
                if index is not None:
                    launches[index] += len(planned) if position == 0 else 0
                    alone = len(parts) == 1
                    moved[index] += sum(one.bytes if alone else one.bytes_by_block[position] for one in planned)
    return [Cost(*pair) for pair in zip(launches, moved, strict=True)]


def _owner(layer: str, owner: Mapping[str, int]) -> int | None:
    """Return the group of the innermost module around a call."""
    while layer not in owner and layer:
        layer = layer.rpartition(".")[0]
    return owner.get(layer)

"""The calls of operators that a forward makes, recorded on the meta device."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from effkernels.ops.mbconv_stack import DEPTHWISE_WEIGHT, TENSORS


@dataclass(frozen=True)
class RecordedCall:
    """One call of an operator in a forward on the meta device.

    Attributes:
        op: its name, 'effkernels::...' or 'aten::...'.
        layer: as of `PlannedLaunch`; of `mbconv_stack` that of each block, with a space between them.
        arguments: by name; of the tensors only shape and dtype count.
        results: the tensors it returned.
        flops: by its FLOP formula; 0 for an operator that has none.
    """

    op: str
    layer: str
    arguments: Mapping[str, Any]
    results: Sequence[Tensor]
    flops: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes on."""
        return self.results[0].dtype


def record_calls(model: nn.Module, images: Tensor) -> list[RecordedCall]:
    """Return the calls of a forward: this project's operators, and PyTorch's that would launch something."""
    recorder = _Recorder(model)
    # On the meta device the CPU's operators represent all: only the shape functions run, which all devices share.
    with torch.no_grad(), recorder.watching_modules(), recorder:
        model(images)
    return recorder.calls


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[RecordedCall] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._owners = {
            id(tensor): path for path, module in model.named_modules() for tensor in module.parameters(recurse=False)
        }
        self._running: list[str] = []

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Keeps track of which module runs, by hooks on all modules at once: those leave a block fusible.

        Modules that other threads run meanwhile do not count.
        """
        thread = threading.get_ident()

        def enter(module: nn.Module, *_: Any) -> None:
            if threading.get_ident() == thread:
                self._running.append(self._paths[id(module)])

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread:
                self._running.pop()

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _layers_of_stack(self, tensors: Sequence[Tensor | None]) -> str:
        weights = tensors[DEPTHWISE_WEIGHT::TENSORS]
        return " ".join(self._owners.get(id(weight)) or self._running[-1] for weight in weights)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = list(tensors_in([result]))
        if launches(func, results):
            names = [argument.name for argument in func._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | kwargs
            weight = arguments.get("weight", arguments.get("w_reduce"))
            if weight is None and "tensors" in arguments:  # of mbconv_stack: a layer for each block
                layer = self._layers_of_stack(arguments["tensors"])
            else:
                layer = self._owners.get(id(weight)) or self._running[-1]
            formula = flop_registry.get(func.overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
            self.calls.append(RecordedCall(func._schema.name, layer, arguments, results, flops))
        return result


def launches(func: Any, results: Sequence[Tensor]) -> bool:
    """Return whether an operator runs something on the device: views, allocations and queries of a tensor do not."""
    if not results or func.is_view or torch.Tag.inplace_view in func.tags:
        return False
    return re.match(r"aten::(_unsafe_view|lift_fresh|(new_)?empty)", func._schema.name) is None


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors among values, and in lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)

"""The operators that PyTorch's dispatcher is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CalledOperators(TorchDispatchMode):
    """Counts the calls of operators by name, "effkernels::mbconv", and by namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.namespaces: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        self.namespaces[func.namespace] += 1
        return func(*args, **(kwargs or {}))


def fused_operators(forward: Callable[[Tensor], Any], x: Tensor) -> int:
    """Return how many fused operators a call of `forward` runs."""
    with torch.no_grad(), CalledOperators() as called:
        forward(x)
    return sum(count for namespace, count in called.namespaces.items() if namespace.startswith("effkernels"))

"""A batch norm as one value: what the operators take, whichever backend computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


class Norm(NamedTuple):
    """A batch norm in eval mode, over C channels; the fields have the order of `F.batch_norm`.

    Equivalent PyTorch: F.batch_norm(z, mean, var, weight, bias, training=False, eps=eps).

    Attributes:
        mean, var: (C,), the running statistics.
        weight, bias: (C,) or None, the affine parameters; None counts as 1 and 0.
        eps: added to the variance; finite and not negative.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5

    @classmethod
    def of(cls, norm: BatchNorm) -> Norm:
        """Return the norm that a batch norm of `torch.nn` computes in eval mode; its tensors are passed on, not copied.

        Raises:
            TypeError: norm is not a batch norm.
            ValueError: norm keeps no running statistics.
        """
        if not isinstance(norm, BatchNorm):
            raise TypeError(f"Norm.of: norm is {type(norm).__name__}; allowed: a batch norm of torch.nn")
        mean, var = norm.running_mean, norm.running_var
        if mean is None or var is None:
            raise ValueError("Norm.of: the batch norm has no running statistics; allowed: track_running_stats=True")
        return cls(mean, var, norm.weight, norm.bias, norm.eps)


def gather_norms(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Gather each norm of the arguments of a schema in one value: `norm_mean`, `norm_var`, ... become `norm`.

    A norm of which no tensor is given is None.
    """
    gathered: dict[str, Any] = {}
    fields: dict[str, dict[str, Any]] = {}
    for name, value in arguments.items():
        before, found, field = name.rpartition("norm_")
        if found and field in Norm._fields:
            fields.setdefault(f"{before}norm", {})[field] = value
        else:
            gathered[name] = value
    for name, given in fields.items():
        tensors: dict[str, Any] = {field: given.get(field) for field in Norm._fields if field != "eps"}
        is_given = any(tensor is not None for tensor in tensors.values())
        gathered[name] = Norm(**tensors, eps=given.get("eps", 1e-5)) if is_given else None
    return gathered

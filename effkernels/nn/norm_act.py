"""A batch norm with its activation, and the modules for the activations and gates of the operators.

Norm and activation are one module, with the activation as its child `act`, because that is where timm has them: code
that cuts a network by its children, or hooks `bn1` or `bn1.act`, finds the same values in both.
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels.ops.reference import activate, canonical_name

_ACTIVATION_MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hard_swish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}
_GATE_MODULES: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "hard_sigmoid": nn.Hardsigmoid}

# What computes the norm alone, whatever children it has, or nothing where a norm was taken out.
_PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.Identity)


def not_scriptable(module: nn.Module) -> nn.Module:
    """Raise RuntimeError: torch.jit.script calls this for a module of this package (`__prepare_scriptable__`)."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile modules that choose between fused operators and "
        f"plain PyTorch; allowed: torch.jit.trace, torch.export.export, effkernels.export_model"
    )


def activation_module(activation: str) -> nn.Module:
    """Return the module of `torch.nn` for one of `effkernels.ops.reference.ACTIVATIONS`."""
    return _ACTIVATION_MODULES[canonical_name(activation)]()


def gate_module(gate_activation: str) -> nn.Module:
    """Return the module of `torch.nn` for one of `effkernels.ops.reference.GATES`."""
    return _GATE_MODULES[canonical_name(gate_activation)]()


class BatchNormAct2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` followed by its children `drop` (nothing, unless it is replaced) and `act`.

    Equivalent PyTorch: `act(drop(batch_norm(x)))`; a state_dict is that of the batch norm.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes it a plain `nn.SyncBatchNorm`, which keeps `act` as a child
    but does not call it. The blocks of this package know that and call it (`norm_act`); where the norm is called by
    itself, convert by `effkernels.convert_sync_batchnorm`.

    Args:
        num_features: channels.
        eps, momentum: as of `nn.BatchNorm2d`.
        activation: one of `effkernels.ops.reference.ACTIVATIONS`.
        device, dtype: of the parameters.
    """

    drop: nn.Module
    act: nn.Module

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        activation: str = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)
        self.drop = nn.Identity()
        self.act = activation_module(activation)

    def forward(self, input: Tensor) -> Tensor:
        """input: (N, num_features, H, W), floating; returns the same shape and dtype."""
        y: Tensor = super().forward(input) if isinstance(input, Tensor) else self._recorded(input)
        activated: Tensor = self.act(self.drop(y))
        return activated

    def __prepare_scriptable__(self) -> nn.Module:
        return not_scriptable(self)

    def _recorded(self, input: Tensor) -> Tensor:
        """Return the norm of a proxy of torch.fx: without a look at its shape, and without a step of the counter."""
        tracked = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
        )


class SyncBatchNormAct(nn.SyncBatchNorm):
    """A synchronised batch norm and what follows it in the module that it replaces (dropout, activation)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, ...), floating; returns the same shape and dtype."""
        y: Tensor = super().forward(x)
        for module in self._modules.values():
            if module is not None:
                y = module(y)
        return y


def norm_act(norm: nn.Module, x: Tensor, activation: str) -> Tensor:
    """Compute `norm(x)`, and return what it leaves out: the activation, where `norm` is one of PyTorch's norms.

    It is one after a conversion (`SyncBatchNorm.convert_sync_batchnorm` and its like) or where somebody put another
    norm in place. A norm that has children `drop` and `act` gets those, any other one `activation`.
    """
    y: Tensor = norm(x)
    if type(norm) not in _PLAIN_NORMS:
        return y
    if "act" not in norm._modules:
        return activate(y, activation)
    for child in norm.children():
        y = child(y)
    return y

"""Squeeze-and-excitation (Hu et al. 2018, "Squeeze-and-Excitation Networks")."""

from __future__ import annotations

from typing import TypedDict, TypeGuard

import torch
from torch import Tensor, nn

from effkernels.nn.conv_bn_act import check_activation
from effkernels.nn.fusible import conv_arguments, is_fusible_pointwise, is_untouched
from effkernels.reference import GATES, activate, apply_gate


class SqueezeExciteArguments(TypedDict):
    """Keyword arguments of `effkernels.ops.depthwise_bn_act_gate`."""

    w_reduce: Tensor
    b_reduce: Tensor | None
    w_expand: Tensor
    b_expand: Tensor | None
    se_activation: str
    gate: str


class SqueezeExcite(nn.Module):
    """Scale each channel of an image by a gate computed from the means of all its channels.

    Equivalent PyTorch: `x * gate(conv_expand(act(conv_reduce(x.mean((2, 3), keepdim=True)))))`, and that is what a
    call of the module runs. Inside a fused block the module only holds the parameters: the operators read them.

    Args:
        channels: C of the input.
        reduced_channels: R, the width between the two products.
        activation: one of `effkernels.reference.ACTIVATIONS`, between them.
        gate: one of `effkernels.reference.GATES`, after the second.
        device, dtype: of the parameters.

    Raises:
        ValueError: activation or gate unknown, or reduced_channels below 1.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        *,
        activation: str = "silu",
        gate: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduced_channels < 1:
            raise ValueError(f"SqueezeExcite: reduced_channels={reduced_channels} must be at least 1")
        if gate not in GATES:
            raise ValueError(f"SqueezeExcite: gate={gate!r} is not known; allowed: {', '.join(GATES)}")
        self.activation = check_activation("SqueezeExcite", activation)
        self.gate = gate
        self.conv_reduce = nn.Conv2d(channels, reduced_channels, 1, device=device, dtype=dtype)
        self.conv_expand = nn.Conv2d(reduced_channels, channels, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), floating; returns the same shape and dtype."""
        pooled = x.mean((2, 3), keepdim=True)
        reduced = activate(self.conv_reduce(pooled), self.activation)
        return x * apply_gate(self.conv_expand(reduced), self.gate)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gate={self.gate!r}"


def is_fusible_squeeze_excite(module: nn.Module | None) -> TypeGuard[SqueezeExcite]:
    """True where the operators may read the parameters of `module` instead of calling it."""
    return (
        isinstance(module, SqueezeExcite)
        and type(module) is SqueezeExcite
        and is_fusible_pointwise(module._modules["conv_reduce"])
        and is_fusible_pointwise(module._modules["conv_expand"])
        and is_untouched(module)
    )


def squeeze_excite_arguments(module: SqueezeExcite) -> SqueezeExciteArguments:
    """What the operators take of a squeeze-and-excitation, by name."""
    reduce, expand = module._modules["conv_reduce"], module._modules["conv_expand"]
    assert isinstance(reduce, nn.Conv2d)
    assert isinstance(expand, nn.Conv2d)
    w_reduce, b_reduce = conv_arguments(reduce)
    w_expand, b_expand = conv_arguments(expand)
    return {
        "w_reduce": w_reduce,
        "b_reduce": b_reduce,
        "w_expand": w_expand,
        "b_expand": b_expand,
        "se_activation": module.activation,
        "gate": module.gate,
    }

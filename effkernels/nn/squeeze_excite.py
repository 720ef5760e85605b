"""Squeeze-and-excitation (Hu et al. 2018, "Squeeze-and-Excitation Networks")."""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from typing import TypedDict

import torch
from torch import Tensor, nn

from effkernels.nn.conv_bn_act import check_activation
from effkernels.nn.fusible import activation_of, conv_arguments, gate_of, is_fusible_pointwise, is_untouched
from effkernels.nn.norm_act import activation_module, gate_module
from effkernels.ops.reference import GATES, canonical_name


class SqueezeExciteArguments(TypedDict):
    """Keyword arguments of `effkernels.ops.depthwise_bn_act_gate`."""

    w_reduce: Tensor
    b_reduce: Tensor | None
    w_expand: Tensor
    b_expand: Tensor | None
    se_activation: str
    gate_activation: str


class SqueezeExcite(nn.Module):
    """Scale each channel of an image by a gate computed from the means of all its channels.

    Equivalent PyTorch: `x * gate(conv_expand(act1(conv_reduce(x.mean((2, 3), keepdim=True)))))`, and that is what a
    call of the module runs. Inside a fused block the module only holds the parameters: the operators read them.

    Args:
        channels: C of the input.
        reduced_channels: R, the width between the two products.
        activation: one of `effkernels.ops.reference.ACTIVATIONS`, between them.
        gate_activation: one of `effkernels.ops.reference.GATES`, after the second.
        device, dtype: of the parameters.

    Raises:
        ValueError: activation or gate_activation unknown, or reduced_channels below 1.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        *,
        activation: str = "silu",
        gate_activation: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduced_channels < 1:
            raise ValueError(f"SqueezeExcite: reduced_channels={reduced_channels} must be at least 1")
        if canonical_name(gate_activation) not in GATES:
            raise ValueError(
                f"SqueezeExcite: gate_activation={gate_activation!r} is not known; allowed: {', '.join(GATES)}"
            )
        check_activation("SqueezeExcite", activation)
        self.conv_reduce = nn.Conv2d(channels, reduced_channels, 1, device=device, dtype=dtype)
        self.act1 = activation_module(activation)
        self.conv_expand = nn.Conv2d(reduced_channels, channels, 1, device=device, dtype=dtype)
        self.gate = gate_module(gate_activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), floating; returns the same shape and dtype."""
        pooled = x.mean((2, 3), keepdim=True)
        y: Tensor = x * self.gate(self.conv_expand(self.act1(self.conv_reduce(pooled))))
        return y


def fusible_squeeze_excite(module: nn.Module | None) -> SqueezeExciteArguments | None:
    """Return the arguments that replace a call of a squeeze-and-excitation; None if it has to be called."""
    if not isinstance(module, SqueezeExcite) or type(module) is not SqueezeExcite or not is_untouched(module):
        return None
    parts = module._modules
    reduce, expand = parts["conv_reduce"], parts["conv_expand"]
    activation, gate = activation_of(parts["act1"]), gate_of(parts["gate"])
    if activation is None or gate is None or not is_fusible_pointwise(reduce) or not is_fusible_pointwise(expand):
        return None
    w_reduce, b_reduce = conv_arguments(reduce)
    w_expand, b_expand = conv_arguments(expand)
    return {
        "w_reduce": w_reduce,
        "b_reduce": b_reduce,
        "w_expand": w_expand,
        "b_expand": b_expand,
        "se_activation": activation,
        "gate_activation": gate,
    }

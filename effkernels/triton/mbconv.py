"""A whole MBConv block by three Triton kernels: expand, depthwise with the gate, project; without expansion by two.

No kernel here holds an image between the stages, which takes blocks that read each other's shared memory; so what is
between x and the result passes through memory.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effkernels.triton.depthwise import depthwise_bn_act, depthwise_bn_act_gate
from effkernels.triton.pointwise import pointwise_bn_act


def mbconv(
    out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Any, activation: str, *others: Any
) -> None:
    """Fill `out`; the arguments are those of the operator, `weight` to `activation` of its first convolution."""
    conv, excite, project, allow_tf32 = others[:7], others[7:13], others[13:17], others[17]
    batch, channels, height, width = x.shape
    expanded = x
    if weight is not None:
        channels = weight.shape[0]
        expanded = _empty(x, batch, channels, height, width)
        pointwise_bn_act(expanded, x, weight, bias, norm, None, None, activation, allow_tf32)
    y = _empty(x, batch, channels, *out.shape[2:])
    gate = None
    if excite[0] is None:
        depthwise_bn_act(y, expanded, *conv)
    else:
        gate = x.new_empty((batch, channels))
        depthwise_bn_act_gate((y, gate), expanded, *conv, *excite)
    project_weight, project_bias, project_norm, residual = project
    pointwise_bn_act(out, y, project_weight, project_bias, project_norm, gate, residual, "identity", allow_tf32)


def _empty(x: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """Return an uninitialised (batch, channels, height, width) tensor in channels_last memory."""
    return x.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


OPERATORS = {"mbconv": mbconv}

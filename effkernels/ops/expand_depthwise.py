"""Expand, depthwise and squeeze in one pass: the wide tensor between the two convolutions is never a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops import _checks, _tf32, reference
from effkernels.ops._registration import Operator, register, run
from effkernels.ops._signature import parts
from effkernels.ops.backends import choose
from effkernels.ops.depthwise import allocate_with_means, depthwise_flops

NAME = "expand_depthwise_squeeze"


def expand_depthwise_squeeze(
    x: Tensor,
    expand_weight: Tensor,
    weight: Tensor,
    *,
    expand_bias: Tensor | None = None,
    expand_norm: Norm | None = None,
    expand_activation: str = "identity",
    bias: Tensor | None = None,
    norm: Norm | None = None,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: int = 1,
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the first half of an MBConv block.

    It is a 1x1 convolution, batch norm and activation, then a depthwise convolution, batch norm and activation, and the
    mean of each channel of that.

    Equivalent PyTorch:

        e = pointwise_bn_act(x, expand_weight, expand_bias, expand_norm, activation=expand_activation)
        y, pooled = depthwise_bn_act_squeeze(e, weight, bias, norm, stride=..., padding=..., activation=activation)

    where the zeros of the padding are zeros of `e`, after the activation. The kernels compute `e` tile by tile and keep
    it on the chip, in x's dtype on a GPU and in float32 on the CPU. On a GPU they are one launch, where not: two. The
    compiled CUDA kernel takes float16 and bfloat16, kernels of 3x3 and 5x5 without dilation, and C_in and C that 8
    divides.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        expand_weight: (C, C_in, 1, 1). This and every parameter below is float32 or of x's dtype.
        weight: (C, 1, KH, KW), KH and KW from 1 to 13.
        expand_bias, expand_norm, expand_activation: of the 1x1 convolution, as in `pointwise_bn_act`; of C channels.
        bias, norm, stride, padding, dilation, activation: of the depthwise convolution, as in `depthwise_bn_act`.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        y: (N, C, H', W') in x's dtype, with exact channels_last strides.
        pooled: (N, C), float32 (float64 where x is float64).

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, stride, activation, backend)
    expand = (x, expand_weight, expand_bias, *parts(expand_norm, NAME, "expand_norm"), expand_activation)
    conv = (weight, bias, *parts(norm, NAME), stride, padding, dilation, activation)
    return run(_overloads, chosen, (*expand, *conv, _tf32.resolve(allow_tf32, x)))


def _check(
    op: str,
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    expand_norm: Norm | None,
    expand_activation: str,
    *conv: Any,
) -> tuple[int, ...]:
    """Check the arguments; returns the shape of y."""
    _checks.pointwise(op, x, expand_weight, expand_bias, expand_norm, None, None, expand_activation, prefix="expand_")
    batch, _, height, width = x.shape
    expanded = x.new_empty(()).expand(batch, expand_weight.shape[0], height, width)  # of one element
    return _checks.depthwise(op, expanded, *conv[:-1], channels_of="expand_weight")


def _flops(shapes: Mapping[str, Any], results: Any) -> int:
    batch, _, height, width = shapes["x"]
    expand: int = 2 * batch * height * width * prod(shapes["expand_weight"][:2])
    return expand + depthwise_flops(results[0], shapes["weight"])


_overloads = register(
    Operator(
        NAME,
        reference.expand_depthwise_squeeze,
        _check,
        allocate_with_means,
        _flops,
        cast=("x", "expand_weight"),
    )
)

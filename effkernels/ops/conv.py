"""Dense convolution with batch norm and activation: the stem of a network, and fused expansions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops import _checks, _tf32, reference
from effkernels.ops._registration import Operator, empty_image, register, run
from effkernels.ops._signature import parts
from effkernels.ops.backends import choose

NAME = "conv_bn_act"


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense convolution (groups 1, dilation 1), batch norm and activation: act(norm(conv(x) + bias)).

    Equivalent PyTorch, for symmetric padding:

        z = F.conv2d(x, weight, bias, stride, (top, left))
        y = act(F.batch_norm(z, norm.mean, norm.var, norm.weight, norm.bias, training=False, eps=norm.eps))

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides.
        weight: (C_out, C_in, K_h, K_w). This and every parameter below is float32 or of x's dtype.
        bias: (C_out,), the bias of the convolution, or None.
        norm: `effkernels.ops.Norm` over C_out channels, such as `Norm.of(batch_norm)`, or None for no norm.
        stride: of both axes, 1 or 2.
        padding: zeros added at (top, bottom, left, right), in pixels, none negative.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H', W') in x's dtype, with exact channels_last strides;
        H' = (H + top + bottom - K_h) // stride + 1 and likewise W'.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, stride, activation, backend)
    tf32 = _tf32.resolve(allow_tf32, x)
    return run(_overloads, chosen, (x, weight, bias, *parts(norm, NAME), stride, padding, activation, tf32))


def _flops(shapes: Mapping[str, Any], results: Any) -> int:
    flops: int = 2 * prod(results) * prod(shapes["weight"][1:])
    return flops


_overloads = register(
    Operator(
        NAME,
        reference.conv_bn_act,
        _checks.conv,
        empty_image,
        _flops,
        cast=("x", "weight"),
    )
)

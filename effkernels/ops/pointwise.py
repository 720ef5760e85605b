"""1x1 convolution with batch norm and activation: the expand and project products of a block, and a network's head."""

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

NAME = "pointwise_bn_act"
POOL = "pointwise_bn_act_pool"


def pointwise_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution of a gated input, batch norm, activation and residual in one pass.

    Equivalent PyTorch:

        z = F.conv2d(x * gate[:, :, None, None], weight, bias)
        y = act(F.batch_norm(z, norm.mean, norm.var, norm.weight, norm.bias, training=False, eps=norm.eps)) + residual

    Sums, norm, activation and the residual addition are computed in float32 whatever the dtypes.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        weight: (C_out, C_in, 1, 1). This and every parameter below is float32 or of x's dtype.
        bias: (C_out,), the bias of the convolution, or None.
        norm: `effkernels.ops.Norm` over C_out channels, such as `Norm.of(batch_norm)`, or None for no norm.
        gate: (N, C_in), float32 or of x's dtype, or None; multiplies the input as it is read.
        residual: (N, C_out, H, W) of x's dtype, or None; added last, after the activation.
        activation: identity, relu, relu6, silu, hard_swish, gelu or gelu_tanh.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H, W) in x's dtype, with exact channels_last strides.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, 1, activation, backend)
    tf32 = _tf32.resolve(allow_tf32, x)
    return run(_overloads, chosen, (x, weight, bias, *parts(norm, NAME), gate, residual, activation, tf32))


def pointwise_bn_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    *,
    activation: str = "identity",
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """1x1 convolution, batch norm, activation and global average pooling in one pass: the head of a network.

    Equivalent PyTorch:

        pointwise_bn_act(x, weight, bias, norm, activation=activation).mean((2, 3))

    The kernels add the values up where they compute them, unrounded, in float32 and in a fixed order, and never write
    them. They are for the small images at the end of a network: on a GPU at most 16 blocks share an image.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once. On a GPU H * W is at most 2^30.
        weight, bias, norm, activation, allow_tf32, backend: as of `pointwise_bn_act`.

    Returns:
        (N, C_out) in x's dtype.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(POOL, x, weight, 1, activation, backend)
    tf32 = _tf32.resolve(allow_tf32, x)
    return run(_pool_overloads, chosen, (x, weight, bias, *parts(norm, POOL), activation, tf32))


def _check_pool(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None, activation: str, allow_tf32: bool
) -> tuple[int, ...]:
    """Check the arguments of `pointwise_bn_act_pool`; returns the shape of its result."""
    return _checks.pointwise(op, x, weight, bias, norm, None, None, activation)[:2]


def _allocate_pool(shape: Sequence[int], x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(tuple(shape))


def _flops_pool(shapes: Mapping[str, Any], results: Any) -> int:
    flops: int = 2 * prod(shapes["x"]) * shapes["weight"][0]
    return flops


def _flops(shapes: Mapping[str, Any], results: Any) -> int:
    flops: int = 2 * prod(results) * shapes["weight"][1]
    return flops


_overloads = register(
    Operator(
        NAME,
        reference.pointwise_bn_act,
        _checks.pointwise,
        empty_image,
        _flops,
        cast=("x", "weight", "residual"),
    )
)
_pool_overloads = register(
    Operator(
        POOL,
        reference.pointwise_bn_act_pool,
        _check_pool,
        _allocate_pool,
        _flops_pool,
        cast=("x", "weight"),
    )
)

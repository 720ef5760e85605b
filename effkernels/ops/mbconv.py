"""A whole MBConv block as one operator: what is between its input and its result need not be a tensor."""

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
from effkernels.ops.reference import canonical_name

NAME = "mbconv"


def mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    weight: Tensor,
    project_weight: Tensor,
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
    w_reduce: Tensor | None = None,
    b_reduce: Tensor | None = None,
    w_expand: Tensor | None = None,
    b_expand: Tensor | None = None,
    se_activation: str = "silu",
    gate_activation: str = "sigmoid",
    project_bias: Tensor | None = None,
    project_norm: Norm | None = None,
    residual: Tensor | None = None,
    allow_tf32: bool | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute an MBConv block: expand, depthwise, squeeze-and-excitation, project and residual.

    Equivalent PyTorch:

        e = pointwise_bn_act(x, expand_weight, expand_bias, expand_norm, activation=expand_activation)
        y, gate = depthwise_bn_act_gate(e, weight, bias, norm, stride=..., activation=activation, w_reduce=..., ...)
        return pointwise_bn_act(y, project_weight, project_bias, project_norm, gate=gate, residual=residual)

    or, without squeeze-and-excitation, `depthwise_bn_act` and no gate.

    On a GPU it is one launch in float16 and bfloat16, for kernels of 3x3 and, with expansion, 5x5, without dilation,
    and channels that 8 divides: by clusters of blocks (compute capability 9.0) where a cluster's shared memory holds an
    image and the plan estimates that this is faster, which are the small planes of late blocks and few images; else
    with the result of the depthwise convolution as scratch memory. All else is three launches on a GPU (two without
    expansion), and three kernels on the CPU.

    Args:
        x: (N, C_in, H, W), float32, float16 or bfloat16; float64 and other devices run the reference. Any strides;
            channels_last is read as it is, anything else is converted once.
        expand_weight: (C, C_in, 1, 1); None: the block has no expansion, e is x and C is C_in. This and every parameter
            below is float32 or of x's dtype.
        weight: (C, 1, KH, KW), KH and KW from 1 to 13.
        project_weight: (C_out, C, 1, 1).
        expand_bias, expand_norm, expand_activation: of the first convolution, as in `pointwise_bn_act`; of C channels.
            None, None and "identity" without expansion.
        bias, norm, stride, padding, dilation, activation: of the depthwise convolution, as in `depthwise_bn_act`.
        w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation: of squeeze-and-excitation, as in
            `depthwise_bn_act_gate`. Neither matrix: the block has none.
        project_bias, project_norm: of the last convolution, which has no activation; of C_out channels.
        residual: (N, C_out, H', W') of x's dtype, such as x itself, or None; added last.
        allow_tf32: whether a float32 product may run in TF32 on a GPU; None: as PyTorch is set for convolutions.
        backend: that runs this call, one of `effkernels.ops.backends.BACKENDS`; "auto": as `effkernels.backend` asks.

    Returns:
        (N, C_out, H', W') in x's dtype, with exact channels_last strides.

    Raises:
        ValueError, TypeError: an argument that the reference refuses (shape, device, value; dtype).
        RuntimeError: an argument that the compiled kernel refuses, or a forced backend that cannot run.
    """
    chosen = choose(NAME, x, weight, stride, activation, backend)
    expand = (x, expand_weight, expand_bias, *parts(expand_norm, NAME, "expand_norm"), expand_activation)
    conv = (weight, bias, *parts(norm, NAME), stride, padding, dilation, activation)
    excite = (w_reduce, b_reduce, w_expand, b_expand, se_activation, gate_activation)
    project = (project_weight, project_bias, *parts(project_norm, NAME, "project_norm"), residual)
    return run(_overloads, chosen, (*expand, *conv, *excite, *project, _tf32.resolve(allow_tf32, x)))


def _check(
    op: str,
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    expand_norm: Norm | None,
    expand_activation: str,
    *others: Any,
) -> tuple[int, ...]:
    """Check the arguments; returns the shape of the result."""
    conv, excite, project = others[:7], others[7:13], others[13:17]
    if expand_weight is None:
        _check_no_expansion(op, expand_bias, expand_norm, expand_activation)
        shape = _checks.depthwise(op, x, *conv)
        channels = x.shape[1]
    else:
        _checks.pointwise(
            op, x, expand_weight, expand_bias, expand_norm, None, None, expand_activation, prefix="expand_"
        )
        batch, _, height, width = x.shape
        channels = expand_weight.shape[0]
        expanded = x.new_empty(()).expand(batch, channels, height, width)  # of one element
        shape = _checks.depthwise(op, expanded, *conv, channels_of="expand_weight")
    w_reduce, b_reduce, w_expand, b_expand = excite[:4]
    if w_reduce is not None and w_expand is not None:
        _checks.squeeze_excite(op, channels, x.device, x.dtype, *excite)
    elif w_reduce is not None or w_expand is not None:
        missing = "w_reduce" if w_reduce is None else "w_expand"
        raise ValueError(f"{op}: w_reduce and w_expand belong together; {missing} is None; allowed: both or neither")
    elif b_reduce is not None or b_expand is not None:
        given = "b_expand" if b_reduce is None else "b_reduce"
        raise ValueError(
            f"{op}: {given} needs w_reduce and w_expand, which are None; allowed: all of squeeze-and-excitation or none"
        )
    project_weight, project_bias, project_norm, residual = project
    convolved = x.new_empty(()).expand(shape)
    return _checks.pointwise(
        op, convolved, project_weight, project_bias, project_norm, None, residual, "identity", prefix="project_"
    )


def _check_no_expansion(op: str, bias: Tensor | None, norm: Norm | None, activation: str) -> None:
    for name, given in (("expand_bias", bias), ("expand_norm", norm)):
        if given is not None:
            raise ValueError(f"{op}: {name} needs expand_weight, which is None; allowed: None")
    if canonical_name(activation) != "identity":
        raise ValueError(
            f"{op}: expand_activation={activation!r} needs expand_weight, which is None; allowed: 'identity'"
        )


def _flops(shapes: Mapping[str, Any], result: Any) -> int:
    batch, _, height, width = shapes["x"]
    out_pixels = batch * prod(result[2:])
    flops: int = 0
    if shapes["expand_weight"] is not None:
        flops += 2 * batch * height * width * prod(shapes["expand_weight"][:2])
    flops += 2 * out_pixels * (prod(shapes["weight"]) + prod(shapes["project_weight"][:2]))
    if shapes.get("w_reduce") is not None:
        flops += 2 * batch * (prod(shapes["w_reduce"]) + prod(shapes["w_expand"]))
    return flops


OPERATOR = Operator(
    NAME,
    reference.mbconv,
    _check,
    empty_image,
    _flops,
    cast=("x", "expand_weight", "w_reduce", "w_expand", "project_weight", "residual"),
)

_overloads = register(OPERATOR)

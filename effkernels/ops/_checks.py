"""Argument checks of the operators, for the shape functions and for the reference path.

The compiled kernels check their arguments themselves, in C++ and with the same wording, so that no call is checked
twice. A message names the operator, the argument, its value and what is allowed. A size that is still symbolic (batch,
height, width and padding under tracing) is not looked at: a comparison would put a guard on it and split the graph.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from effkernels._norm import Norm
from effkernels.ops._signature import norm_type_error
from effkernels.ops.backends import depthwise_kernel_problem
from effkernels.ops.reference import ACTIVATIONS, GATES, _surely

DEPTHWISE_STRIDES: tuple[int, ...] = (1, 2)
# As the compiled kernels have it (csrc/sizes.h): products of sizes stay in 64 bits.
_LARGEST_SIZE = 2**31 - 1
_MOST_ELEMENTS = 2**54
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def depthwise(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    activation: str,
    *,
    channels_of: str = "x",
) -> tuple[int, ...]:
    """Check the arguments of a depthwise operator; returns the shape of its image.

    `channels_of` names the argument that decided the channels of x.
    """
    _check_x(op, x)
    _check_tensor(op, "weight", weight, x.device, x.dtype)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"{op}: weight has shape {_shape(weight)}; allowed: (C, 1, KH, KW)")
    channels, _, kernel_height, kernel_width = weight.shape
    if problem := depthwise_kernel_problem(kernel_height, kernel_width):
        raise ValueError(f"{op}: weight is {problem}")
    if x.shape[1] != channels:
        allowed = f"({x.shape[1]}, 1, {kernel_height}, {kernel_width})"
        raise ValueError(
            f"{op}: weight has shape {_shape(weight)}; allowed: {allowed}, with the channels of {channels_of}"
        )
    if stride not in DEPTHWISE_STRIDES:
        raise ValueError(f"{op}: stride={stride}; allowed: {_list(DEPTHWISE_STRIDES)}")
    if not 1 <= dilation <= _LARGEST_SIZE:
        raise ValueError(f"{op}: dilation={dilation}; allowed: 1 to 2^31 - 1")
    _check_norm(op, x, bias, norm, channels)
    _check_activation(op, "activation", activation)
    window = (dilation * (kernel_height - 1) + 1, dilation * (kernel_width - 1) + 1)
    return _check_window(op, x, channels, window, stride, padding)


def types(op: str, arguments: Sequence[Any], args: Sequence[Any]) -> None:
    """Check the Python types of `args` for the arguments of a schema, as the dispatcher does."""
    for argument, value in zip(arguments, args, strict=True):
        kind = str(argument.type)
        optional = kind.startswith("Optional[")
        allowed, words = _PYTHON_TYPES[kind.removeprefix("Optional[").removesuffix("]") if optional else kind]
        if not (isinstance(value, allowed) or (optional and value is None)):
            words += " or None" if optional else ""
            raise TypeError(f"{op}: {argument.name} is {type(value).__name__}; allowed: {words}")
        if isinstance(value, (list, tuple)) and not all(isinstance(number, (int, torch.SymInt)) for number in value):
            raise TypeError(f"{op}: {argument.name}={value!r}; allowed: {words}")
        if kind == "float" and type(value) is int and abs(value) > sys.float_info.max:
            raise ValueError(f"{op}: {argument.name} is an integer that no float holds; allowed: a finite number")


# What the dispatcher takes for each type of a schema, bool for a number included.
_PYTHON_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "Tensor": ((Tensor,), "Tensor"),
    "float": ((float, int, torch.SymFloat, torch.SymInt), "a number"),
    "int": ((int, torch.SymInt), "an integer"),
    "List[int]": ((list, tuple), "four integers"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "True or False"),
}


def squeeze_excite(
    op: str,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    w_reduce: Tensor,
    b_reduce: Tensor | None,
    w_expand: Tensor,
    b_expand: Tensor | None,
    activation: str,
    gate_activation: str,
    *,
    activation_name: str = "se_activation",
) -> None:
    """Check the squeeze-and-excitation arguments of an operator whose pooled values have `channels` channels.

    Each parameter may be float32 or `dtype`, that of the gate.
    """
    if dtype not in _FLOATING:
        raise TypeError(f"{op}: w_expand has dtype {_name(dtype)}; allowed: {_list(map(_name, _FLOATING))}")
    for name, matrix in (("w_reduce", w_reduce), ("w_expand", w_expand)):
        _check_tensor(op, name, matrix, device, dtype)
    reduced = w_reduce.shape[0] if w_reduce.dim() else 0
    if reduced < 1 or not _is_matrix(w_reduce, reduced, channels):
        allowed = f"(R, {channels}) or (R, {channels}, 1, 1), R at least 1"
        raise ValueError(f"{op}: w_reduce has shape {_shape(w_reduce)}; allowed: {allowed}")
    if not _is_matrix(w_expand, channels, reduced):
        allowed = f"({channels}, {reduced}) or ({channels}, {reduced}, 1, 1)"
        raise ValueError(f"{op}: w_expand has shape {_shape(w_expand)}; allowed: {allowed}")
    _check_elements(op, "w_reduce", (reduced, channels))
    _check_vector(op, "b_reduce", b_reduce, reduced, device, dtype)
    _check_vector(op, "b_expand", b_expand, channels, device, dtype)
    _check_activation(op, activation_name, activation)
    if gate_activation not in GATES:
        raise ValueError(f"{op}: gate_activation={gate_activation!r} is not known; allowed: {_list(GATES)}")


def pooled(op: str, value: Tensor) -> None:
    """Check the pooled input (N, C) of `squeeze_excite_gate`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: pooled is {type(value).__name__}; allowed: Tensor")
    dense(op, "pooled", value)
    if value.dim() != 2 or value.shape[1] < 1:
        raise ValueError(
            f"{op}: pooled has shape {_shape(value)}; allowed: two dimensions (N, C), at least one channel"
        )
    _check_sizes(op, "pooled", value.shape)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: pooled has dtype {_name(value.dtype)}; allowed: float32, float64")


def pointwise(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    allow_tf32: bool | None = None,
    *,
    prefix: str = "",
) -> tuple[int, ...]:
    """Check the arguments of `pointwise_bn_act`; returns the shape of its result.

    `prefix` comes before their names where an operator has two norms.
    """
    _check_x(op, x)
    _check_tensor(op, f"{prefix}weight", weight, x.device, x.dtype)
    if weight.dim() != 4 or weight.shape[2] != 1 or weight.shape[3] != 1:
        raise ValueError(f"{op}: {prefix}weight has shape {_shape(weight)}; allowed: (Cout, Cin, 1, 1)")
    _check_in_channels(op, x, weight, prefix)
    out_channels, in_channels = weight.shape[:2]
    _check_elements(op, f"{prefix}weight", (out_channels, in_channels))
    name = "the expanded tensor" if prefix == "expand_" else "the result"
    shape = (x.shape[0], out_channels, x.shape[2], x.shape[3])
    _check_elements(op, name, shape)
    _check_norm(op, x, bias, norm, out_channels, prefix)
    if gate is not None:
        _check_tensor(op, "gate", gate, x.device, x.dtype)
        if gate.dim() != 2 or gate.shape[1] != in_channels or _surely(gate.shape[0] != x.shape[0]):
            raise ValueError(f"{op}: gate has shape {_shape(gate)}; allowed: ({x.shape[0]}, {in_channels})")
    if residual is not None:
        _check_tensor(op, "residual", residual, x.device, x.dtype, exactly=True)
        if residual.dim() != 4 or any(_surely(a != b) for a, b in zip(residual.shape, shape, strict=True)):
            raise ValueError(f"{op}: residual has shape {_shape(residual)}; allowed: {_tuple(shape)}")
    _check_activation(op, f"{prefix}activation", activation)
    return shape


def conv(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    stride: int,
    padding: Sequence[int],
    activation: str,
    allow_tf32: bool | None = None,
) -> tuple[int, ...]:
    """Check the arguments of `conv_bn_act`; returns the shape of its result."""
    _check_x(op, x)
    _check_tensor(op, "weight", weight, x.device, x.dtype)
    if weight.dim() != 4 or weight.shape[2] < 1 or weight.shape[3] < 1:
        raise ValueError(f"{op}: weight has shape {_shape(weight)}; allowed: (Cout, Cin, KH, KW)")
    _check_in_channels(op, x, weight)
    if not 1 <= stride <= _LARGEST_SIZE:
        raise ValueError(f"{op}: stride={stride}; allowed: 1 to 2^31 - 1")
    _check_sizes(op, "weight", weight.shape)
    _check_norm(op, x, bias, norm, weight.shape[0])
    _check_activation(op, "activation", activation)
    return _check_window(op, x, weight.shape[0], (weight.shape[2], weight.shape[3]), stride, padding)


def dense(op: str, name: str, t: Tensor) -> None:
    """Check that a tensor has elements in memory by strides: not sparse, quantized, nested or MKL-DNN's."""
    if t.is_nested or t.is_quantized or t.layout is not torch.strided:
        kind = "nested" if t.is_nested else "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is a tensor of layout {kind}; allowed: strided")


def _check_x(op: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is {type(x).__name__}; allowed: Tensor")
    dense(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {_shape(x)}; allowed: four dimensions (N, C, H, W)")
    if x.dtype not in _FLOATING:
        raise TypeError(f"{op}: x has dtype {_name(x.dtype)}; allowed: {_list(map(_name, _FLOATING))}")
    if any(_surely(size < 1) for size in x.shape[1:]):
        raise ValueError(f"{op}: x has shape {_shape(x)}; allowed: at least one channel, row and column")
    _check_sizes(op, "x", x.shape)


def _check_tensor(
    op: str, name: str, t: Tensor, device: torch.device, dtype: torch.dtype, exactly: bool = False
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} is {type(t).__name__}; allowed: Tensor")
    dense(op, name, t)
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, the input on {device}; allowed: one device for all")
    allowed = (dtype,) if exactly else tuple(dict.fromkeys((torch.float32, dtype)))
    if t.dtype not in allowed:
        raise TypeError(f"{op}: {name} has dtype {_name(t.dtype)}; allowed: {_list(map(_name, allowed))}")


def _check_vector(op: str, name: str, t: Tensor | None, length: int, device: torch.device, dtype: torch.dtype) -> None:
    if t is None:
        return
    _check_tensor(op, name, t, device, dtype)
    if t.dim() != 1 or t.shape[0] != length:
        raise ValueError(f"{op}: {name} has shape {_shape(t)}; allowed: ({length},)")


def _check_norm(op: str, x: Tensor, bias: Tensor | None, norm: Norm | None, channels: int, prefix: str = "") -> None:
    """Check bias and norm of a convolution to `channels`."""
    _check_vector(op, f"{prefix}bias", bias, channels, x.device, x.dtype)
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise norm_type_error(op, f"{prefix}norm", norm)
    parts: tuple[Any, ...] = norm  # of a call by the schema, any of them may be None
    mean, var, weight, bias, eps = parts
    for name, t in zip(norm._fields[:-1], parts[:-1], strict=True):
        _check_vector(op, f"{prefix}norm_{name}", t, channels, x.device, x.dtype)
    both = f"{prefix}norm_mean and {prefix}norm_var"
    if (mean is None) != (var is None):
        missing = "norm_mean" if mean is None else "norm_var"
        raise ValueError(f"{op}: {both} belong together; {prefix}{missing} is None; allowed: both or neither")
    if mean is None and (weight is not None or bias is not None):
        given = "norm_weight" if weight is not None else "norm_bias"
        raise ValueError(f"{op}: {prefix}{given} needs {both}, which are None; allowed: all of the norm or none")
    if not 0 <= eps < math.inf:  # also false for NaN; torch.compile may hand in a symbolic float
        raise ValueError(f"{op}: {prefix}norm_eps={eps}; allowed: finite and not negative")


def _check_activation(op: str, name: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: {name}={activation!r} is not known; allowed: {_list(ACTIVATIONS)}")


def _check_in_channels(op: str, x: Tensor, weight: Tensor, prefix: str = "") -> None:
    if x.shape[1] != weight.shape[1]:
        allowed = f"{x.shape[1]} input channels, as {'weight' if prefix == 'project_' else 'x'} has"
        raise ValueError(f"{op}: {prefix}weight has shape {_shape(weight)}; allowed: {allowed}")
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: {prefix}weight has shape {_shape(weight)}; allowed: at least one output channel")


def _check_sizes(op: str, name: str, sizes: Sequence[int]) -> None:
    if any(_surely(size > _LARGEST_SIZE) for size in sizes):
        raise ValueError(f"{op}: {name} has shape {_tuple(sizes)}; allowed: sizes below 2^31")
    _check_elements(op, name, sizes)


def _check_elements(op: str, name: str, sizes: Sequence[int]) -> None:
    """Check the product of sizes, of which an empty batch counts as 1: its strides are as large. A trace, whose sizes
    are symbols, is not checked; the operator is when it runs.
    """
    if torch.compiler.is_compiling():
        return
    elements = 1
    for size in sizes:
        if type(size) is int and size > 0:
            elements *= size
    if elements > _MOST_ELEMENTS:
        raise ValueError(f"{op}: {name} has shape {_tuple(sizes)}; allowed: sizes whose product is at most 2^54")


def _check_window(
    op: str, x: Tensor, out_channels: int, window: tuple[int, int], stride: int, padding: Sequence[int]
) -> tuple[int, ...]:
    """Check the window of a convolution; returns the shape of its result."""
    if len(padding) != 4:
        raise ValueError(f"{op}: padding has {len(padding)} numbers; allowed: four (top, bottom, left, right)")
    if any(_surely(side < 0) or _surely(side > _LARGEST_SIZE) for side in padding):
        raise ValueError(f"{op}: padding={_tuple(padding)}; allowed: four numbers from 0 to 2^31 - 1")
    top, bottom, left, right = padding
    out_height = (x.shape[2] + top + bottom - window[0]) // stride + 1
    out_width = (x.shape[3] + left + right - window[1]) // stride + 1
    if _surely(out_height < 1) or _surely(out_width < 1):
        raise ValueError(
            f"{op}: the output would be {out_height} x {out_width} (image {x.shape[2]} x {x.shape[3]}, "
            f"padding={_tuple(padding)}, window {window[0]} x {window[1]}); allowed: at least one output"
        )
    shape = (x.shape[0], out_channels, out_height, out_width)
    _check_elements(op, "the result", shape)
    return shape


def _is_matrix(t: Tensor, rows: int, columns: int) -> bool:
    return tuple(t.shape) in ((rows, columns), (rows, columns, 1, 1))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return _tuple(t.shape)


def _tuple(values: Sequence[object]) -> str:
    inner = ", ".join(map(str, values))
    return f"({inner},)" if len(values) == 1 else f"({inner})"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))

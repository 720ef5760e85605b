"""A fused forward as a small Python function: written from a match, compiled once, carried along as data.

The function walks the modules' own dicts to the parts it needs, declines (returns None) where any of them is no longer
what the match saw, and otherwise calls the fused operators and, for the rest, what the original forward calls. As
source it can be pickled with the model, read in a traceback, and traced by torch.compile; as straight code it costs
little more than the operators (a loop over steps would cost half as much again).

Memory format: the result has the format of the input. For an NCHW input everything between is channels_last, and goes
back to NCHW before whatever might depend on strides, and at the end.
"""

from __future__ import annotations

import builtins
import functools
import linecache
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels import backends, ops
from effkernels.nn.fusible import (
    NormArguments,
    conv_arguments,
    conv_norm_arguments,
    is_untouched,
    norm_arguments,
)
from effkernels.nn.padding import same_padding


def inward(x: Any, convert: bool) -> Any:
    """A four-dimensional tensor in channels_last memory; anything else, or without `convert`, as it is."""
    if convert and isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def outward(x: Any, convert: bool) -> Any:
    """A four-dimensional tensor in NCHW memory; anything else, or without `convert`, as it is."""
    if convert and isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous()
    return x


def like(result: Tensor, source: Tensor, convert: bool) -> Tensor:
    """`result` in the memory format of `source`, where no end of the program will see to it."""
    return result if convert or source.stride(1) == 1 else result.contiguous()


def squeeze(x: Tensor) -> Tensor:
    """(N, C): the mean of each channel of (N, C, H, W), float32 for 16-bit values."""
    return x.mean((2, 3), dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)


def same(x: Tensor, kernel: tuple[int, int], stride: int, dilation: int) -> tuple[int, int, int, int]:
    """TensorFlow's SAME at (top, bottom, left, right) for the size of `x`."""
    return (
        *same_padding(x.shape[2], kernel[0], stride, dilation),
        *same_padding(x.shape[3], kernel[1], stride, dilation),
    )


def keeps_expanded(x: Tensor) -> bool:
    """Whether the expanded tensor of a block had better never become one, as in `effkernels.nn.MBConv`."""
    return x.is_cpu and backends.selected() in ("auto", "cpu")


def expand_depthwise(
    x: Tensor,
    expand: nn.Conv2d,
    expand_norm: BatchNorm | None,
    expand_activation: str,
    conv: nn.Conv2d,
    norm: BatchNorm | None,
    activation: str,
    stride: int,
    padding: tuple[int, int, int, int],
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """1x1 and depthwise convolution, each with norm and activation, in one operator; also the means of the channels."""
    expand_weight, expand_bias = conv_arguments(expand)
    weight, bias = conv_arguments(conv)
    first = _NO_NORM if expand_norm is None else norm_arguments(expand_norm)
    second = _NO_NORM if norm is None else norm_arguments(norm)
    return ops.expand_depthwise_squeeze(
        x,
        expand_weight,
        weight,
        expand_bias=expand_bias,
        expand_norm_weight=first[0],
        expand_norm_bias=first[1],
        expand_norm_mean=first[2],
        expand_norm_var=first[3],
        expand_eps=first[4],
        expand_activation=expand_activation,
        bias=bias,
        norm_weight=second[0],
        norm_bias=second[1],
        norm_mean=second[2],
        norm_var=second[3],
        eps=second[4],
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
    )


_NO_NORM: NormArguments = (None, None, None, None, 0.0)
_BASE: dict[str, Any] = {
    "__builtins__": builtins,  # and no __name__: torch.compile would look for the names in the module of that name
    "Tensor": Tensor,
    "conv_arguments": conv_arguments,
    "conv_norm_arguments": conv_norm_arguments,
    "expand_depthwise": expand_depthwise,
    "inward": inward,
    "is_untouched": is_untouched,
    "keeps_expanded": keeps_expanded,
    "like": like,
    "norm_arguments": norm_arguments,
    "outward": outward,
    "same": same,
    "squeeze": squeeze,
    **{name: getattr(ops, name) for name in ops.__all__},
}


class Program:
    """The fused form of one method of a module.

    Attributes:
        source: of the function `run(self, x)`; it returns None where it declines.
        names: what the source names besides the helpers of this file: classes, functions, constants.
        argument: name of the method's first argument.
        defaults: the other arguments with the values that the program holds for.
        ignored: those of them that may have any value.
        backend: that its operators are forced to, or "auto".
        fused: blocks that it runs fused.
        run: the compiled source.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        argument: str,
        defaults: Mapping[str, Any],
        ignored: frozenset[str],
        backend: str,
        fused: int,
    ) -> None:
        self.source = source
        self.names = dict(names)
        self.argument = argument
        self.defaults = dict(defaults)
        self.ignored = ignored
        self.backend = backend
        self.fused = fused
        self.run: Callable[[Any, Any], Any] = _function(source, self.names)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The one input among the arguments of a call; None where the program does not hold for the others."""
        given = dict(zip((self.argument, *self.defaults), args, strict=False)) | kwargs
        x = given.pop(self.argument, None)
        for name, value in given.items():
            if name in self.ignored:
                continue
            default = self.defaults.get(name, ...)
            if value is not default and not (isinstance(value, int | float | str) and value == default):
                return None
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self  # nothing in it ever changes

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (
            *(self.source, self.names, self.argument, self.defaults),
            *(self.ignored, self.backend, self.fused),
        )


@functools.cache
def _code(source: str) -> types.CodeType:
    file = f"<effkernels program {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    return next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def _function(source: str, names: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    return types.FunctionType(_code(source), {**_BASE, **names}, "run")

"""A fused forward as two small Python functions: written from a match, compiled once, carried along as data.

`look` walks the modules' own dicts to the parts it needs and declines (returns None) where any of them is no longer
what the match saw. `run` takes the parts and calls the fused operators and, for the rest, what the original forward
calls. As source they can be pickled with the model, read in a traceback, and traced by torch.compile; as straight code
`run` costs little more than the operators (a loop over steps would cost half as much again). A second look is seldom
needed: see `effkernels.optimize.watching`.

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

from effkernels import backends, ops
from effkernels.nn.fusible import is_untouched, parameters_of
from effkernels.nn.padding import same_padding
from effkernels.optimize.watching import Part, Watched


def has_parameters(module: nn.Module) -> bool:
    """Whether weight and bias, or None in their place, lie where they are looked for."""
    parameters = parameters_of(module)
    return "weight" in parameters and "bias" in parameters


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


MOST_ROWS = 4  # of what a linear layer is given, up to which its weights' way from memory is all that counts


def is_few_rows(x: Any, weight: Tensor) -> bool:
    """Whether a linear layer with that weight had better go through `multiply_rows`: a few rows on a CPU.

    Compiled, it never does: the graph would depend on the number of rows. Nor under a mode that watches functions of
    PyTorch: whoever does that waits for F.linear (as class activation maps do).
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_torch_function_mode_enabled()
        and isinstance(x, Tensor)
        and x.is_cpu
        and x.dim() == 2
        and 1 <= x.shape[0] <= MOST_ROWS
        and x.shape[1] == weight.shape[1]
        and x.dtype == weight.dtype
        and x.dtype in backends.DTYPES
        and backends.selected() in ("auto", "cpu")
    )


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of (N, C_in) by the fused 1x1 convolution: each row is an image of one pixel."""
    return ops.pointwise_bn_act(x[:, :, None, None], weight[:, :, None, None], bias).flatten(1)


_BASE: dict[str, Any] = {
    "__builtins__": builtins,  # and no __name__: torch.compile would look for the names in the module of that name
    "Tensor": Tensor,
    "has_parameters": has_parameters,
    "inward": inward,
    "is_few_rows": is_few_rows,
    "is_untouched": is_untouched,
    "keeps_expanded": keeps_expanded,
    "like": like,
    "multiply_rows": multiply_rows,
    "outward": outward,
    "parameters_of": parameters_of,
    "same": same,
    "squeeze": squeeze,
    **{name: getattr(ops, name) for name in ops.__all__},
}


class Program:
    """The fused form of one method of a module.

    Attributes:
        source: of the functions `look(self)`, which returns the parts or None where it declines, and
            `run(self, x, parts)`.
        names: what the source names besides the helpers of this file: classes, functions, constants.
        argument: name of the method's first argument.
        defaults: the other arguments with the values that the program holds for.
        ignored: those of them that may have any value.
        backend: that its operators are forced to, or "auto".
        fused: blocks that it runs fused.
        watched: what of the modules `look` goes by.
        parts: what it returns.
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
        watched: tuple[Watched, ...],
        parts: tuple[Part, ...],
    ) -> None:
        self.source = source
        self.names = dict(names)
        self.argument = argument
        self.defaults = dict(defaults)
        self.ignored = ignored
        self.backend = backend
        self.fused = fused
        self.watched = watched
        self.parts = parts
        self.look: Callable[[Any], tuple[Any, ...] | None]
        self.compute: Callable[[Any, Any, tuple[Any, ...]], Any]
        self.look, self.compute = _functions(source, self.names)

    def run(self, module: Any, x: Any) -> Any:
        """Look, and compute; None where either declines."""
        parts = self.look(module)
        return None if parts is None else self.compute(module, x, parts)

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
            *(self.ignored, self.backend, self.fused, self.watched, self.parts),
        )


@functools.cache
def _codes(source: str) -> tuple[types.CodeType, ...]:
    file = f"<effkernels program {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    return tuple(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def _functions(source: str, names: Mapping[str, Any]) -> list[types.FunctionType]:
    return [types.FunctionType(code, {**_BASE, **names}, code.co_name) for code in _codes(source)]

"""A fused forward as a small Python function: written from a match, compiled once, carried along as data.

It takes its parameters and modules from a guard (`effkernels.optimize.guarding`), which declines where any module is no
longer what the match saw, and calls the fused operators and, for the rest, what the original forward calls. As source
it can be pickled with the model, read in a traceback, and traced by torch.compile; as straight code it costs little
more than the operators (a loop over steps would cost half as much again).

Memory format: the result has the format of the input. For an NCHW input everything between is channels_last, and goes
back to NCHW before whatever might depend on strides, and at the end.
"""

from __future__ import annotations

import builtins
import copy
import functools
import linecache
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effkernels import backends, ops
from effkernels.nn.fusible import is_untouched
from effkernels.nn.padding import same_padding
from effkernels.optimize.guarding import Guard, is_plain_tensor, replaced_method
from effkernels.optimize.swapping import BOUND


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


def keeps_expanded(x: Tensor, backend: str) -> bool:
    """Whether the expanded tensor of a block had better never become one, as in `effkernels.nn.MBConv`."""
    return x.is_cpu and (backends.selected() if backend == "auto" else backend) in ("auto", "cpu")


LEAST_WEIGHTS_PER_VALUE = 6


def convolve(module: Any, x: Any, nchw: bool) -> Any:
    """`module(x)` for a convolution that stays PyTorch's, in the memory format in which that is faster."""
    if torch.compiler.is_compiling():
        return module(outward(x, nchw))
    if not _is_faster_in_nchw(module, x):
        return module(x)
    result = module(x.contiguous())
    return result if nchw else result.contiguous(memory_format=torch.channels_last)


def _is_faster_in_nchw(module: Any, x: Any) -> bool:
    weight = module._parameters.get("weight")
    return (
        x.is_cpu
        and isinstance(weight, Tensor)
        and weight.numel() >= LEAST_WEIGHTS_PER_VALUE * x.numel()
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def takes_bare(x: Tensor) -> bool:
    """Whether a convolution that nothing follows is the operator's: channels_last tensors, on a CPU in float32.

    Two conversions of an NCHW image cost more than the operator gains; in bfloat16, PyTorch's time divided by the
    operator's is 0.5 to 1.5 (see `roles.FEWEST_CHANNELS_BARE` for the machine and the shapes).
    """
    return x.stride(1) == 1 and (x.dtype is torch.float32 or not x.is_cpu)


MOST_ROWS = 4  # of what a linear layer is given, up to which its weights' way from memory is all that counts


def linear(module: Any, x: Any, backend: str) -> Any:
    """`module(x)` for an `nn.Linear` with many weights.

    Its weights are read once per batch, 5 MB for B0's classifier. With one image in the batch that is all it does, and
    BLAS does it on one thread, in a tenth of the time of the whole fused network; the fused 1x1 convolution shares the
    rows of the weights among the threads. From a handful of images on it is a matrix product like any other, and BLAS
    keeps it.
    """
    if _is_few_rows(module, x, backend):
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        return ops.pointwise_bn_act(x[:, :, None, None], weight[:, :, None, None], bias, backend=backend).flatten(1)
    return module(x)


def _is_few_rows(module: Any, x: Any, backend: str) -> bool:
    """Whether `linear` had better use the operator: a few rows, on a CPU.

    Compiled, it never does: the graph would depend on the number of rows. Nor under a mode that watches functions of
    PyTorch: whoever does that waits for F.linear (as class activation maps do).
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_torch_function_mode_enabled()
        or (backends.selected() if backend == "auto" else backend) not in ("auto", "cpu")
        or not (isinstance(x, Tensor) and x.is_cpu and x.dim() == 2 and 1 <= x.shape[0] <= MOST_ROWS)
        or type(module) is not nn.Linear
        or not is_untouched(module)
        or replaced_method(module)
    ):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias", False)
    if not isinstance(weight, Tensor) or bias is False or not (is_plain_tensor(weight) and is_plain_tensor(bias)):
        return False
    return x.shape[1] == weight.shape[1] and x.dtype == weight.dtype and x.dtype in backends.DTYPES


_BASE: dict[str, Any] = {
    "__builtins__": builtins,  # and no __name__: torch.compile would look for the names in the module of that name
    "Tensor": Tensor,
    "convolve": convolve,
    "inward": inward,
    "keeps_expanded": keeps_expanded,
    "like": like,
    "linear": linear,
    "outward": outward,
    "pad": F.pad,
    "same": same,
    "squeeze": squeeze,
    "takes_bare": takes_bare,
    **{name: getattr(ops, name) for name in ops.__all__},
}


class Program:
    """The fused form of one method of a module.

    Attributes:
        source: of the function `run(self, x, parts)`, which returns None where it declines.
        names: what the source names besides the helpers of this file: classes, functions, constants.
        argument: name of the method's first argument.
        defaults: the other arguments with the values that the program holds for.
        ignored: those of them that may have any value.
        fused: blocks that it runs fused.
        guard: which has the parts, and declines where the modules are not what they were.
    """

    def __init__(
        self,
        source: str,
        names: Mapping[str, Any],
        argument: str,
        defaults: Mapping[str, Any],
        ignored: frozenset[str],
        fused: int,
        guard: Guard,
    ) -> None:
        self.source = source
        self.names = dict(names)
        self.argument = argument
        self.defaults = dict(defaults)
        self.ignored = ignored
        self.fused = fused
        self.guard = guard
        self.compute: Callable[[Any, Any, tuple[Any, ...]], Any] = _function(source, self.names)

    def run(self, module: Any, x: Any) -> Any:
        """The result for `x`; None where the guard or the function declines."""
        parts = self.guard.take(module, BOUND + self.argument)
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
        return Program(*self._state(), copy.deepcopy(self.guard, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Program, (*self._state(), self.guard)

    def _state(self) -> tuple[str, dict[str, Any], str, Mapping[str, Any], frozenset[str], int]:
        return self.source, self.names, self.argument, self.defaults, self.ignored, self.fused


@functools.cache
def _code(source: str) -> types.CodeType:
    file = f"<effkernels program {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    (code,) = (constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    return code


def _function(source: str, names: Mapping[str, Any]) -> types.FunctionType:
    return types.FunctionType(_code(source), {**_BASE, **names}, "run")

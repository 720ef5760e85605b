"""A fused forward as a small Python function: written from a match, compiled once, carried along as data.

It takes its parameters and modules from a guard (`effkernels.optimize.guarding`), which declines where any module is no
longer what the match saw, and calls the fused operators and, for the rest, what the original forward calls. As source
it can be pickled with the model, read in a traceback, and traced by torch.compile; as straight code it costs little
more than the operators (a loop over steps would cost half as much again).

Memory format: the result has the format of the input. For an NCHW input everything between is channels_last, but for
convolutions that stay PyTorch's where NCHW is faster, and goes back to NCHW before whatever might depend on strides,
and at the end.
"""

from __future__ import annotations

import builtins
import copy
import functools
import linecache
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effkernels import ops
from effkernels.nn.fusible import is_untouched
from effkernels.nn.padding import same_padding
from effkernels.ops import backends
from effkernels.optimize.guarding import Guard, is_plain_tensor, replaced_method
from effkernels.optimize.stacking import in_stacks
from effkernels.optimize.swapped import BOUND


def inward(x: Any, convert: bool) -> Any:
    """Return a four-dimensional tensor in channels_last memory; anything else, or without `convert`, as it is."""
    if convert and isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def outward(x: Any, convert: bool) -> Any:
    """Return a four-dimensional tensor in NCHW memory; anything else, or without `convert`, as it is."""
    if convert and isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous()
    return x


def like(result: Tensor, source: Tensor, convert: bool) -> Tensor:
    """Return `result` in the memory format of `source`, where no end of the program will see to it."""
    return result if convert or source.stride(1) == 1 else result.contiguous()


def squeeze(x: Tensor) -> Tensor:
    """(N, C): the mean of each channel of (N, C, H, W), float32 for 16-bit values."""
    return x.mean((2, 3), dtype=torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype)


def same(size: Sequence[int], kernel: tuple[int, int], stride: int, dilation: int) -> tuple[int, int, int, int]:
    """Return the padding of TensorFlow's SAME at (top, bottom, left, right) for an image of (..., height, width)."""
    return (
        *same_padding(size[-2], kernel[0], stride, dilation),
        *same_padding(size[-1], kernel[1], stride, dilation),
    )


def keeps_expanded(x: Tensor, backend: str) -> bool:
    """Return whether a block runs faster without an expanded tensor in memory, as in `effkernels.nn.MBConv`."""
    return x.is_cpu and (backends.selected() if backend == "auto" else backend) in ("auto", "cpu")


LEAST_WEIGHTS_PER_VALUE = 6
"""Weights for each value of its input from which `convolve` changes the format. PyTorch's convolution of a
channels_last image rearranges weights that are stored otherwise at every call; that grows with the weights, the change
of format with the image. 3x3, batch 1, channels_last / by way of NCHW and back, in milliseconds (float32, one thread of
a two-core AMD EPYC with AVX-512); the ratio of weights and values in brackets:

    channels   at 28x28             at 14x14            at 7x7              at 4x4
      64       0.55 / 0.63 (0.7)    0.19 / 0.23 (2.9)   0.07 / 0.09 (12)    0.04 / 0.04 (36)
     128       2.33 / 2.49 (1.5)    0.62 / 0.61 (5.9)   0.26 / 0.26 (24)    0.15 / 0.11 (72)
     256       8.84 / 9.19 (2.9)    2.79 / 2.64 (12)    1.05 / 1.03 (47)    0.59 / 0.34 (144)
     512       36.3 / 35.4 (5.9)    12.3 / 10.2 (24)    6.32 / 4.17 (94)    3.28 / 1.95 (288)

Batch 8, 512 channels: 19.4 / 16.5 at 7x7 (12), 9.6 / 6.3 at 4x4 (36). bfloat16, 512 channels: 5.4 / 5.0 at 14x14, 2.4 /
1.9 at 7x7. Between two convolutions that both stay PyTorch's, one of the two conversions falls away.
"""


def convolve(module: Any, x: Any, nchw: bool) -> Any:
    """Compute `module(x)` for a convolution that stays PyTorch's, in the memory format that is faster for its weights.

    Where the program ends in NCHW, so may the result; else it is channels_last as `x`. Compiled, the choice must not
    depend on the size: an NCHW program then gives it NCHW, as the plain forward does.
    """
    if torch.compiler.is_compiling():
        return module(outward(x, nchw))
    weight = module._parameters.get("weight")
    if not _is_stored_nchw(weight, x) or weight.numel() < LEAST_WEIGHTS_PER_VALUE * x.numel():
        return module(x)
    return inward(module(x.contiguous()), not nchw)


def as_written(module: Any, x: Any, nchw: bool) -> Any:
    """Compute `module(x)` for a module around convolutions that stay PyTorch's, with `x` as without any program.

    A program for channels_last may be a part of one for NCHW, as its weights show.
    """
    x = outward(x, nchw)
    if nchw or torch.compiler.is_compiling():
        return module(x)
    dense = (one for one in module.modules() if isinstance(one, nn.Conv2d) and one.groups == 1)
    weight = next((one._parameters.get("weight") for one in dense if one.kernel_size != (1, 1)), None)
    if not _is_stored_nchw(weight, x):
        return module(x)
    return pytree.tree_map(lambda result: inward(result, True), module(x.contiguous()))


def _is_stored_nchw(weight: Any, x: Any) -> bool:
    """Return whether the weights have another format than `x`, a channels_last image on a CPU."""
    return (
        isinstance(x, Tensor)
        and x.is_cpu
        and x.dim() == 4
        and isinstance(weight, Tensor)
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def takes_bare(x: Tensor) -> bool:
    """Return whether the operator runs a convolution that nothing follows: channels_last tensors, on a CPU in float32.

    Two conversions of an NCHW image cost more than the operator gains; in bfloat16, PyTorch's time divided by the
    operator's is 0.5 to 1.5 (see `roles.FEWEST_CHANNELS_BARE` for the machine and the shapes).
    """
    return x.stride(1) == 1 and (x.dtype is torch.float32 or not x.is_cpu)


MOST_ROWS = 4  # of what a linear layer is given, up to which its weights' way from memory is all that counts


def linear(module: Any, x: Any, backend: str) -> Any:
    """Compute `module(x)` for an `nn.Linear` with many weights.

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
    """Return whether `linear` should use the operator: a few rows, on a CPU.

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
    "as_written": as_written,
    "convolve": convolve,
    "in_stacks": in_stacks,
    "inward": inward,
    "keeps_expanded": keeps_expanded,
    "like": like,
    "linear": linear,
    "outward": outward,
    "pad": F.pad,
    "same": same,
    "squeeze": squeeze,
    "takes_bare": takes_bare,
    "takes_block": backends.takes_block,
    "Norm": ops.Norm,
    **{name: getattr(ops, name) for name in backends.OPERATORS},
}


class Program:
    """The fused form of one method of a module.

    Attributes:
        source: of the function `run(self, x, parts)`, which returns None if it declines; where the method is an MBConv
            block and nothing else, of `block(size, residual, parts, backend)` too.
        block: this function, else None. It returns the arguments of `effkernels.ops.mbconv` but x, for an input of
            size (..., height, width); None if it declines, or was written for another backend. `residual` is passed
            on where the block adds its input.
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
        functions = _functions(source, self.names)
        self.compute: Callable[[Any, Any, tuple[Any, ...]], Any] = functions["run"]
        self.block: Callable[[Sequence[int], Any, tuple[Any, ...], str], dict[str, Any] | None] | None
        self.block = functions.get("block")

    @property
    def has_stacks(self) -> bool:
        """Return whether it runs blocks that follow each other as one operator, where that is faster."""
        return in_stacks.__name__ in self.compute.__code__.co_names

    def run(self, module: Any, x: Any) -> Any:
        """Return the result for `x`; None if the guard or the function declines."""
        parts = self.guard.take(module, BOUND + self.argument)
        return None if parts is None else self.compute(module, x, parts)

    def input_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the one input among the arguments of a call; None if the program does not hold for the others."""
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
def _codes(source: str) -> tuple[types.CodeType, ...]:
    file = f"<effkernels program {len(linecache.cache)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = compile(source, file, "exec")
    return tuple(constant for constant in module.co_consts if isinstance(constant, types.CodeType))


def _functions(source: str, names: Mapping[str, Any]) -> dict[str, types.FunctionType]:
    known = {**_BASE, **names}
    found = {code.co_name: types.FunctionType(code, known, code.co_name) for code in _codes(source)}
    known.update(found)
    return found

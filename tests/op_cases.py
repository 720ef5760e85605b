"""Inputs for the tests of the operators: one `Case` says everything about a call, `Case.draw` makes the tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import effkernels
from effkernels._norm import gather_norms
from effkernels.ops import call
from effkernels.ops.call import DEPTHWISE_OPS, IMAGES, OpCall, in_float64, tensors

EXPAND_OP = "expand_depthwise_squeeze"
BLOCK_OP = "mbconv"
POOL_OP = "pointwise_bn_act_pool"
IMAGE_OPS = (*DEPTHWISE_OPS, "pointwise_bn_act", POOL_OP, "conv_bn_act", EXPAND_OP, BLOCK_OP)
ALL_OPS = (*IMAGE_OPS, "squeeze_excite_gate")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ODD_CHANNELS = (1, 7, 8, 24, 40, 100)
ODD_PLANES = ((1, 1), (7, 9), (13, 14))
SQUARE_KERNELS = (3, 5, 7, 9)  # of the kernels that every backend compiles for their size
# Kernels whose height and width are known at run time only, of every width up to the largest.
OTHER_KERNELS = (
    *((1, width) for width in (1, 3, 4, 7, 8, 11, 13)),
    *((height, 1) for height in (2, 3, 7, 11, 13)),
    *((2, 2), (3, 5), (5, 3), (3, 7), (7, 6), (13, 9), (9, 12), (11, 11), (4, 10), (13, 13)),
)
LAYOUTS = ("channels_last", "contiguous", "sliced", "sliced_rows", "expanded")


@dataclass(frozen=True, kw_only=True)
class Case(OpCall):
    """One call of one operator, the types of its tensors and the memory layout of its images.

    `parameters`: "float32", "same" (x's dtype) or "mixed" (each tensor the other way).
    """

    dtype: torch.dtype = field(default=torch.float32, kw_only=False)
    batch: int = 2
    channels: int = 24
    out_channels: int = 20
    expanded: int = 96
    reduced: int = 6
    height: int = 13
    width: int = 14
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    parameters: str = "float32"
    layout: str = "channels_last"

    def __str__(self) -> str:
        fields = sorted(dataclasses.fields(self), key=lambda f: f.name != "dtype")
        changed = [
            f"{f.name}={str(getattr(self, f.name)).removeprefix('torch.').replace(' ', '')}"
            for f in fields
            if f.name != "op" and getattr(self, f.name) != f.default
        ]
        return "-".join([self.op, *changed])

    def draw(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments of the operator by their names in the schema; `flat` hands them to effkernels.ops."""
        names = [name for name in self.shapes() if name not in ("x", "pooled", "residual")]
        own = {"float32": [], "same": names, "mixed": names[1::2]}[self.parameters]
        dtypes = {name: self.dtype if name in own else torch.float32 for name in names}
        arguments = self.arguments(self.dtype, device, seed=seed, dtypes=dtypes)
        return {name: laid_out(a, self.layout) if name in IMAGES else a for name, a in arguments.items()}


def laid_out(image: Tensor, layout: str) -> Tensor:
    """`image` in another memory layout. A sliced one is inside a larger tensor of NaN, which nothing may read or
    write: `assert_surroundings_untouched` checks it.
    """
    if layout == "contiguous":
        return image.contiguous()
    if layout == "channels_last":
        return image.clone(memory_format=torch.channels_last)
    if layout == "expanded":  # batch and width of stride 0: every image and every column is the first one
        return image[:1, :, :, :1].clone().expand(image.shape)
    n, c, h, w = image.shape
    margin = (0, 2, 1, 3) if layout == "sliced" else (0, 0, 1, 0)
    larger = image.new_full((n, c + 2 * margin[1], h + 2 * margin[2], w + 2 * margin[3]), float("nan"))
    larger = larger.contiguous(memory_format=torch.channels_last)
    view = larger[:, margin[1] : margin[1] + c, margin[2] : margin[2] + h, margin[3] : margin[3] + w]
    view.copy_(image)
    return view


def assert_surroundings_untouched(view: Tensor, image: Tensor) -> None:
    """Assert that the storage around a sliced `view` is still NaN and the view itself still `image`."""
    assert torch.equal(view, image), "an input was written to"
    whole = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    finite = int(torch.isfinite(whole).sum())
    assert finite == view.numel(), f"{finite - view.numel()} elements around an input were written to"


class flat:
    """The operators of effkernels.ops or effkernels.reference, with the parts of a norm as arguments of their own."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return lambda *args, **arguments: getattr(self._module, op)(*args, **gather_norms(arguments))


def run(module: Any, case: Case, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the outputs of the operator of `case` in effkernels.ops or effkernels.ops.reference, always as a tuple."""
    return call.run(module, case.op, arguments)


@contextmanager
def one_thread() -> Iterator[None]:
    """For the yardsticks: on a busy machine PyTorch's small convolutions take 16 ms with two threads, 0.2 with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_cpu(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same arguments with every tensor on the CPU."""
    return {name: a.cpu() if isinstance(a, Tensor) else a for name, a in arguments.items()}


def truth(case: Case, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return the outputs in float64, by the reference, on the device of the arguments.

    Computed on the CPU: some of cuDNN's kernels multiply what they pad with, or the channels of other groups by zero,
    and make NaN of an infinity or a NaN that has no part in an element.
    """
    (device,) = {a.device for _, a in tensors(arguments)}
    outputs = run(effkernels.ops.reference, case, in_float64(on_cpu(arguments)))
    return tuple(y.to(device) for y in outputs)


def overload(op: str) -> Any:
    """Return the compiled operator `op`."""
    return getattr(torch.ops.effkernels, op).default


def positional(op: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """`arguments` by name as the positional arguments that the schema of the compiled operator wants."""
    defaults = {"norm_eps": 1e-5, "expand_norm_eps": 1e-5, "project_norm_eps": 1e-5, "allow_tf32": False}
    names = [argument.name for argument in overload(op)._schema.arguments]
    assert set(arguments) <= set(names)
    return tuple(arguments.get(name, defaults.get(name)) for name in names)

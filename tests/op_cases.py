"""Inputs for the tests of the operators: one `Case` says everything about a call, `Case.draw` makes the tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import effkernels
from effkernels._norm import gather_norms

DEPTHWISE_OPS = ("depthwise_bn_act", "depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "depthwise_bn_act_se")
EXPAND_OP = "expand_depthwise_squeeze"
IMAGE_OPS = (*DEPTHWISE_OPS, "pointwise_bn_act", "conv_bn_act", EXPAND_OP)
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


@dataclass(frozen=True)
class Case:
    """One call of one operator. `parameters`: "float32", "same" (x's dtype) or "mixed" (each tensor the other way).

    `channels` are those of x, also where an expand convolution makes `out_channels` of them for the depthwise one.
    """

    op: str
    dtype: torch.dtype = torch.float32
    batch: int = 2
    channels: int = 24
    out_channels: int = 20
    reduced: int = 6
    height: int = 13
    width: int = 14
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: int = 1
    activation: str = "silu"
    expand_activation: str = "silu"
    se_activation: str = "silu"
    gate_activation: str = "sigmoid"
    norm: str = "full"
    bias: bool = False
    gated: bool = False
    residual: bool = False
    parameters: str = "float32"
    matrix_rank: int = 4
    layout: str = "channels_last"

    def __str__(self) -> str:
        changed = [
            f"{f.name}={str(getattr(self, f.name)).removeprefix('torch.').replace(' ', '')}"
            for f in dataclasses.fields(self)
            if f.name != "op" and getattr(self, f.name) != f.default
        ]
        return "-".join([self.op, *changed])

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def draw(self, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
        """Return the arguments of the operator by their names in the schema; `flat` hands them to effkernels.ops."""
        generator = torch.Generator().manual_seed(seed)
        made = 0

        def parameter(*shape: int, low: float | None = None, scale: float = 1.0) -> Tensor:
            nonlocal made
            made += 1
            other = self.parameters == "same" or (self.parameters == "mixed" and made % 2 == 0)
            t = torch.randn(shape, generator=generator) * scale
            t = t if low is None else t.abs() * 0.5 + low
            return t.to(self.dtype if other else torch.float32).to(device)

        def norm(channels: int, prefix: str = "") -> dict[str, Tensor]:
            given: dict[str, Tensor] = {}
            if self.bias:
                given["bias"] = parameter(channels)
            if self.norm == "full":
                given["norm_weight"], given["norm_bias"] = parameter(channels, low=0.5), parameter(channels)
            if self.norm in ("full", "statistics"):
                given["norm_mean"], given["norm_var"] = parameter(channels, scale=0.5), parameter(channels, low=0.25)
            return {prefix + name: t for name, t in given.items()}

        def excite() -> dict[str, Any]:
            tail = (1, 1) if self.matrix_rank == 4 else ()
            return {
                "w_reduce": parameter(self.reduced, self.channels, *tail, scale=self.channels**-0.5 * 2),
                "b_reduce": parameter(self.reduced) if self.bias else None,
                "w_expand": parameter(self.channels, self.reduced, *tail, scale=self.reduced**-0.5 * 2),
                "b_expand": parameter(self.channels) if self.bias else None,
                "gate_activation": self.gate_activation,
            }

        if self.op == "squeeze_excite_gate":
            pooled = torch.randn(self.batch, self.channels, generator=generator).to(device)
            return {"pooled": pooled, **excite(), "activation": self.se_activation}
        image = torch.randn(self.batch, self.channels, self.height, self.width, generator=generator).to(self.dtype)
        arguments: dict[str, Any] = {"x": laid_out(image.to(device), self.layout), "activation": self.activation}
        if self.op == "pointwise_bn_act":
            shape = (self.out_channels, self.channels, 1, 1)
            arguments |= {"weight": parameter(*shape, scale=self.channels**-0.5), **norm(self.out_channels)}
            if self.gated:
                arguments["gate"] = parameter(self.batch, self.channels).sigmoid()
            if self.residual:
                shape = (self.batch, self.out_channels, self.height, self.width)
                added = torch.randn(shape, generator=generator).to(self.dtype).to(device)
                arguments["residual"] = laid_out(added, self.layout)
            return arguments
        arguments |= {"stride": self.stride, "padding": self.padding}
        taps = self.kernel[0] * self.kernel[1]
        if self.op == "conv_bn_act":
            fan_in = taps * self.channels
            weight = parameter(self.out_channels, self.channels, *self.kernel, scale=fan_in**-0.5)
            return arguments | {"weight": weight, **norm(self.out_channels)}
        channels = self.out_channels if self.op == EXPAND_OP else self.channels
        if self.op == EXPAND_OP:
            expand = parameter(channels, self.channels, 1, 1, scale=self.channels**-0.5)
            arguments |= {"expand_weight": expand, **norm(channels, "expand_")}
            arguments["expand_activation"] = self.expand_activation
        weight = parameter(channels, 1, *self.kernel, scale=taps**-0.5)
        arguments |= {"weight": weight, "dilation": self.dilation, **norm(channels)}
        if self.op in ("depthwise_bn_act_gate", "depthwise_bn_act_se"):
            arguments |= {**excite(), "se_activation": self.se_activation}
        return arguments


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
    outputs = getattr(flat(module), case.op)(**arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@contextmanager
def one_thread() -> Iterator[None]:
    """For the yardsticks: on a busy machine PyTorch's small convolutions take 16 ms with two threads, 0.2 with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_float64(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same arguments with every tensor in float64."""
    return {name: a.double() if isinstance(a, Tensor) else a for name, a in arguments.items()}


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


def tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors among the arguments, with their names."""
    return ((name, a) for name, a in arguments.items() if isinstance(a, Tensor))


def overload(op: str) -> Any:
    """Return the compiled operator `op`."""
    return getattr(torch.ops.effkernels, op).default


def positional(op: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """`arguments` by name as the positional arguments that the schema of the compiled operator wants."""
    defaults = {"norm_eps": 1e-5, "expand_norm_eps": 1e-5, "allow_tf32": False}
    names = [argument.name for argument in overload(op)._schema.arguments]
    assert set(arguments) <= set(names)
    return tuple(arguments.get(name, defaults.get(name)) for name in names)

"""Random right calls of the operators: any operator, shape, dtype, memory format and parameters, from one seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effkernels.ops import reference
from effkernels.ops.backends import DTYPES, OPERATORS
from effkernels.ops.call import IMAGES, OpCall

LAYOUTS = ("channels_last", "contiguous", "sliced", "strided", "transposed", "expanded", "unaligned")
_MOST_ELEMENTS = 1 << 17  # of x and of the result
_MOST_PRODUCTS = 1 << 25  # multiply-adds of a call: PyTorch's 16-bit convolutions take a second for 2^30

# Values of the images. With levels a sum of equal numbers shows what it rounds off.
_FILLS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "positive": lambda shape, g: torch.rand(shape, generator=g),
    "levels": lambda shape, g: (torch.rand((*shape[:2], 1, 1), generator=g) + 0.1).expand(shape).clone(),
    "sparse": lambda shape, g: torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) > 0.9),
    "uneven": lambda shape, g: (
        torch.randn(shape, generator=g) * torch.exp2(torch.randn((*shape[:2], 1, 1), generator=g))
    ),
}


@dataclass(frozen=True, kw_only=True)
class RandomCall(OpCall):
    """A call whose tensors have types of their own: `draw` makes their values, others for each `draw_seed`.

    Attributes:
        dtype: of the images.
        dtypes: of every tensor argument.
        absent: the tensors that are left out of those that `OpCall` describes.
        eps: of each norm, by its name in the schema.
        layout, fill: of the images, of LAYOUTS and the fills.
        isa: CPU instruction set.
        threads: of the second run, whose bits must be those of the first.
    """

    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    absent: frozenset[str]
    eps: Mapping[str, float]
    layout: str
    fill: str
    isa: str
    threads: int

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.shapes().items())
        options = ", ".join(f"{name}={value}" for name, value in self.options().items())
        dtypes = {str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}
        return f"{self.op}({shapes}; {options}; {'/'.join(sorted(dtypes))}, {self.layout}, {self.fill}, {self.isa})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that is given, by its name in the schema."""
        return {name: shape for name, shape in super().shapes().items() if name not in self.absent}

    def options(self) -> dict[str, Any]:
        """Return the arguments that are no tensors, by name."""
        return super().options() | self.eps

    def draw(self, draw_seed: int) -> dict[str, Any]:
        """Return the arguments by their names in the schema."""
        arguments = self.arguments(self.dtype, seed=draw_seed, dtypes=self.dtypes)
        generator = torch.Generator().manual_seed(draw_seed)
        for name in IMAGES:
            if name in arguments:
                values = _FILLS[self.fill](arguments[name].shape, generator).to(self.dtype)
                arguments[name] = laid_out(values, self.layout)
        return arguments


def laid_out(image: Tensor, layout: str) -> Tensor:
    """Return the image in another memory layout. Memory around a sliced or strided one is NaN: nothing may read it."""
    n, c, h, w = image.shape
    if layout == "channels_last":
        return image.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return image[:1, :, :, :1].clone().expand(image.shape)
    if layout == "transposed":
        return image.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3)
    if layout == "unaligned":
        memory = image.new_full((image.numel() + 1,), math.nan)
        view = memory[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        return view.copy_(image)
    if layout in ("sliced", "strided"):
        step = 2 if layout == "strided" else 1
        larger = image.new_full((n, h * step + 2, w * step + 3, c + 1), math.nan).permute(0, 3, 1, 2)
        view = larger[:, 1:, 1 : 1 + h * step : step, 2 : 2 + w * step : step]
        return view.copy_(image)
    return image.contiguous()


def available_isas() -> list[str]:
    """Return the CPU instruction sets of this build on this machine."""
    found = []
    for name in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "plain"):
        try:
            found.append(torch.ops.effkernels.cpu_isa(name))
        except RuntimeError:
            continue
    torch.ops.effkernels.cpu_isa("auto")
    return found


def _size(rng: random.Random, largest: int) -> int:
    """From 1 to `largest`, small ones and those around a power of two more often."""
    kind = rng.random()
    if kind < 0.15:
        return 1
    if kind < 0.5:
        return rng.randint(1, min(largest, 20))
    if kind < 0.75:
        return max(1, min(largest, 2 ** rng.randint(1, 14) + rng.randint(-1, 1)))
    return max(1, min(largest, round(math.exp(rng.uniform(0, math.log(largest + 1))))))


def _plane(rng: random.Random, most: int) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.1:
        return 1, _size(rng, most)
    if kind < 0.2:
        return _size(rng, most), 1
    if kind < 0.3:
        short = rng.randint(2, 20)
        long = max(1, most // short)
        return (short, long) if rng.random() < 0.5 else (long, short)
    height = _size(rng, min(most, 160))
    return height, _size(rng, min(160, max(1, most // height)))


def _kernel(rng: random.Random, largest: int) -> tuple[int, int]:
    if rng.random() < 0.5:
        side = rng.choice((1, 3, 5, 7, 9))
        return min(side, largest), min(side, largest)
    return rng.randint(1, largest), rng.randint(1, largest)


def _window(
    rng: random.Random, largest: int, op: str, planes: int, height: int, width: int
) -> tuple[tuple[int, int], int, tuple[int, int, int, int]]:
    """Kernel, dilation and padding whose result, of a stride of 1, PyTorch computes in less than a second."""
    for _ in range(20):
        kernel = _kernel(rng, largest)
        # PyTorch takes the groups of a dilated convolution one by one.
        dilation = rng.choice((1, 1, 1, 2, 3, 50)) if op != "conv_bn_act" and planes <= 100 else 1
        rows, columns = ((k - 1) * dilation + 1 for k in kernel)
        top, bottom, left, right = (rng.choice((0, w // 2, rng.randint(0, w))) for w in (rows, rows, columns, columns))
        bottom += max(0, rows - height - top - bottom)
        right += max(0, columns - width - left - right)
        pixels = (height + top + bottom - rows + 1) * (width + left + right - columns + 1)
        if planes * pixels <= 4 * _MOST_ELEMENTS and planes * pixels * kernel[0] * kernel[1] <= _MOST_PRODUCTS:
            return kernel, dilation, (top, bottom, left, right)
    return (1, 1), 1, (0, 0, 0, 0)


def draw_call(seed: int, isas: list[str]) -> RandomCall:
    """Return the call of a seed."""
    rng = random.Random(seed)
    op, dtype = rng.choice(OPERATORS), rng.choice(DTYPES)
    batch, channels = rng.choice((0, 1, 1, 1, 2, 3, 5, 17)), _size(rng, 3000)
    sizes: dict[str, Any] = {"batch": batch, "channels": channels}
    sizes["reduced"] = _size(rng, max(1, min(300, _MOST_ELEMENTS // channels)))
    if op != "squeeze_excite_gate":
        height, width = _plane(rng, max(1, _MOST_ELEMENTS // channels // max(1, batch)))
        pixels, out = max(1, batch) * height * width, channels
        if op in ("pointwise_bn_act", "pointwise_bn_act_pool", "conv_bn_act", "expand_depthwise_squeeze", "mbconv"):
            out = _size(rng, max(1, min(2000, _MOST_ELEMENTS // pixels, _MOST_PRODUCTS // (pixels * channels))))
        sizes |= {"height": height, "width": width, "out_channels": out}
        if op == "mbconv":  # as many products in the last convolution as in the first
            sizes["expanded"] = out
            sizes["out_channels"] = rng.choice((channels, min(channels, _size(rng, 300))))
        if op not in ("pointwise_bn_act", "pointwise_bn_act_pool"):
            dense = max(1, min(7, int((_MOST_PRODUCTS / (pixels * channels * out)) ** 0.5)))
            largest = dense if op == "conv_bn_act" else 13
            kernel, dilation, padding = _window(rng, largest, op, max(1, batch) * out, height, width)
            strides = (1, 2, 2, 3, 5, 1000) if op == "conv_bn_act" else (1, 2)
            sizes |= {"kernel": kernel, "dilation": dilation, "padding": padding, "stride": rng.choice(strides)}
    names = ("activation", "expand_activation", "se_activation")
    activations = {name: rng.choice(reference.ACTIVATIONS) for name in names}
    everything = OpCall(
        op, **sizes, **activations, gate_activation=rng.choice(reference.GATES), matrix_rank=rng.choice((2, 4)),
        bias=True, gated=True, residual=True,
    )  # fmt: skip
    optional = ("bias", "expand_bias", "project_bias", "b_reduce", "b_expand", "gate", "residual")
    absent = {name for name in optional if rng.random() < 0.5}
    eps = {}
    for norm in ("norm", "expand_norm", "project_norm"):
        kind = rng.choice(("full", "full", "statistics", "none"))
        absent |= {f"{norm}_weight", f"{norm}_bias"} if kind != "full" else set()
        absent |= {f"{norm}_mean", f"{norm}_var"} if kind == "none" else set()
        if kind != "none" and f"{norm}_mean" in everything.shapes():
            eps[f"{norm}_eps"] = rng.choice((0.0, 1e-5, 1e-3, 1.0))
    parameters = rng.choice(("float32", "same", "mixed"))

    def dtype_of(name: str) -> torch.dtype:
        if name in IMAGES or (name == "w_expand" and op == "squeeze_excite_gate"):
            return dtype
        if name == "pooled" or parameters == "float32":
            return torch.float32
        return dtype if parameters == "same" or rng.random() < 0.5 else torch.float32

    return RandomCall(
        **vars(everything), dtype=dtype, dtypes={name: dtype_of(name) for name in everything.shapes()},
        absent=frozenset(absent), eps=eps, layout=rng.choice(LAYOUTS), fill=rng.choice(tuple(_FILLS)),
        isa=rng.choice(isas), threads=rng.choice((1, 2, 3)),
    )  # fmt: skip

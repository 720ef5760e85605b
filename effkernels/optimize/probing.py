"""Find what a module or a function computes by calling it, not by knowing its name.

Libraries write the same activation as a module, as a function and as an autograd function of their own. Calls on
fixed float64 probes distinguish them: silu is what returns silu's values. The probes have several shapes, with
sizes that no constant of a model fits all of (a shuffle of channels in 3 groups is the identity of 3 channels), and
values over the whole range of float32, infinities and NaN among them (a clip at 20 is a relu of small numbers). A
module of an unknown class is only probed where its forward does the same at every size (`is_uniform`). A convolution or
a norm of an unknown subclass is called as a twin of a few channels with random parameters, so that this costs the same
for every width and works for models on the meta device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.padding import PaddedConv2d, explicit_padding, same_padding
from effkernels.ops.reference import ACTIVATIONS, GATES, activate, apply_gate
from effkernels.optimize.twins import Twins
from effkernels.optimize.unknown import Unknown

_TOLERANCE = 1e-12  # float64 on values below 10: equal formulas agree to a few roundings, unlike ones differ by 1e-4
_TWIN_CHANNELS = 2

Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Padding:
    """Zeros around the input of a convolution: the same on every call, or SAME for the size of the input.

    Attributes:
        sides: zeros at (top, bottom, left, right), in pixels; None: TensorFlow's SAME.
    """

    sides: Sides | None

    def around(self, sides: Sides) -> Padding | None:
        """Return this padding with more zeros around it; None if that has no fixed sides."""
        if self.sides is None:
            return self if sides == (0, 0, 0, 0) else None
        return Padding(tuple(a + b for a, b in zip(self.sides, sides, strict=True)))  # type: ignore[arg-type]


@functools.cache
def probes() -> tuple[Tensor, ...]:
    """Return images in float64 on the CPU. Only the batch has a size twice, and no size divides another."""
    return tuple(_probe(shape) for shape in ((2, 3, 11, 13), (1, 8, 9, 7), (2, 11, 6, 13), (1, 13, 1, 10)))


def _probe(shape: tuple[int, ...]) -> Tensor:
    """Return values from -9 to 9 in an order that no axis follows, with powers of ten, infinities and NaN."""
    powers = torch.logspace(-45, 38, 84, dtype=torch.float64, device="cpu")
    special = torch.tensor([0.0, -0.0, 20.5, -20.5, 255.5, -255.5, float("inf"), -float("inf"), float("nan")])
    odd = torch.cat([special.double(), powers, -powers])
    count = math.prod(shape)
    small = torch.linspace(-9.0, 9.0, count, dtype=torch.float64, device="cpu")
    if count >= 2 * len(odd):
        small = torch.cat([small[::2][: count - len(odd)], odd])[:count]
        small = torch.cat([small, torch.linspace(-9.0, 9.0, count - len(small), dtype=torch.float64, device="cpu")])
    order = (torch.arange(count, device="cpu") * 89) % count  # 89 is prime to every count: a permutation
    return small[order].reshape(shape)


def activation_of(function: Callable[[Tensor], Any]) -> str | None:
    """Return the name in `ACTIVATIONS` of an elementwise function ("identity" among them), or None."""
    found = _answers(function)
    return None if found is None else _name_of(found, {name: _activation(name) for name in ACTIVATIONS})


def returns_its_input(function: Callable[[Tensor], Any]) -> bool:
    """Return whether a function returns the same tensor, or a view of it, and not a copy that may be written to."""
    x = probes()[0].clone()
    try:
        found = function(x)
    except Exception:  # as in _answers
        return False
    return isinstance(found, Tensor) and found.data_ptr() == x.data_ptr()


def gate_of(function: Callable[[Tensor], Any]) -> str | None:
    """Return the name in `GATES` of an elementwise function, or None."""
    found = _answers(function)
    return None if found is None else _name_of(found, {name: _gate(name) for name in GATES})


def is_mean_over_image(function: Callable[[Tensor], Any]) -> bool:
    """Return whether a function takes (N, C, H, W) to its means, (N, C) or (N, C, 1, 1)."""
    images = [x.nan_to_num(0.5, 8.0, -8.0).clamp(-9.0, 9.0) for x in probes()]
    found = _answers(function, images)
    if found is None or any(
        y.shape not in (x.shape[:2], (*x.shape[:2], 1, 1)) for x, y in zip(images, found, strict=True)
    ):
        return False
    return all(_equal(y.flatten(1), x.mean((2, 3))) for x, y in zip(images, found, strict=True))


def padding_of(conv: nn.Conv2d) -> Padding:
    """Return how a convolution pads its input, by zeros or as its padding_mode says, if its forward is nothing but a
    convolution of its own weight.

    Raises:
        Unknown: it is something else.
    """
    if conv.padding_mode != "zeros" and type(conv) is not nn.Conv2d:
        raise Unknown(f"padding_mode={conv.padding_mode!r} of a {_class_name(conv)} is not zeros")
    own = explicit_padding(conv, 0, 0) if type(conv) is nn.Conv2d or isinstance(conv.padding, str) else _sides(conv)
    if type(conv) is nn.Conv2d:
        return Padding(own)
    candidates = [Padding(own), Padding(None)]
    if isinstance(conv, PaddedConv2d) and conv.native_size is not None:
        candidates.append(Padding(conv.padding_for(0, 0)))
    for child in conv.children():
        if isinstance(child, nn.ZeroPad2d):
            candidates.append(Padding(own).around(sides_of(child.padding)) or Padding(own))
    twins = _twins_of_conv(conv)
    twin = twins.root
    assert isinstance(twin, nn.Conv2d)
    for candidate in candidates:
        if _pads_like(twin, candidate) and not twins.written():
            return candidate
    raise Unknown(f"the forward of {_class_name(conv)} is not a convolution of its weight with a padding known here")


def norm_activation_of(norm: BatchNorm) -> str:
    """Return the activation that a batch norm applies to what it normalised; "identity" for a plain one.

    Raises:
        Unknown: its forward is something else.
    """
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return "identity"
    generator = torch.Generator(device="cpu").manual_seed(0)
    mean, var, weight, bias = torch.rand(4, 3, generator=generator, dtype=torch.float64, device="cpu").add(0.5).unbind()
    twins = _twins(norm)
    twin = twins.root
    count = torch.tensor(0, device="cpu")
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    twin.__dict__["_buffers"] = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    twins.settle()

    def normalise(activation: str, x: Tensor) -> Tensor:
        return activate(F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps), activation)

    found = _answers(twin, probes()[:1])
    known = {name: functools.partial(normalise, name) for name in ACTIVATIONS}
    activation = None if found is None else _name_of(found, known)
    if activation is None or twins.written():
        raise Unknown(f"the forward of {_class_name(norm)} is not a batch norm with an activation known here")
    return activation


def sides_of(padding: Any) -> Sides:
    """(top, bottom, left, right) of PyTorch's (left, right, top, bottom), or of one number for all."""
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    return int(top), int(bottom), int(left), int(right)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _answers(function: Callable[[Tensor], Any], images: Sequence[Tensor] | None = None) -> list[Tensor] | None:
    """Return a function's result for each probe; None if it cannot take one of them."""
    answers = []
    for x in probes() if images is None else images:
        try:
            found = function(x.clone())
        except Exception:  # any error whatever only says that it is not the function looked for
            return None
        if not isinstance(found, Tensor) or found.dtype != torch.float64 or not found.is_cpu:
            return None
        answers.append(found)
    return answers


def _name_of(found: list[Tensor], known: Mapping[str, Callable[[Tensor], Tensor]]) -> str | None:
    """Return the name of the function that gives these answers to the probes."""
    for name, function in known.items():
        if all(_equal(one, function(x)) for one, x in zip(found, probes(), strict=False)):
            return name
    return None


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: activate(x, name)


def _gate(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: apply_gate(x, name)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        torch.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
    )


def _twins(module: nn.Module) -> Twins:
    """Return a twin in eval mode, whose parameters can be replaced without touching the original."""
    twins = Twins(module)
    for twin in twins.root.modules():
        twin.training = False
    twins.settle()
    return twins


def _twins_of_conv(conv: nn.Conv2d) -> Twins:
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    if conv.groups > 1 and not depthwise:
        raise Unknown(f"groups={conv.groups} of {conv.in_channels} channels is neither dense nor depthwise")
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (_TWIN_CHANNELS, 1 if depthwise else _TWIN_CHANNELS, *conv.kernel_size)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    bias = torch.randn(_TWIN_CHANNELS, generator=generator, dtype=torch.float64, device="cpu")
    twins = _twins(conv)
    twin = twins.root
    assert isinstance(twin, nn.Conv2d)
    twin.in_channels = twin.out_channels = _TWIN_CHANNELS
    twin.groups = _TWIN_CHANNELS if depthwise else 1
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    twins.settle()
    return twins


def _pads_like(conv: nn.Conv2d, padding: Padding) -> bool:
    """Return whether a twin computes a convolution with that padding, on sizes of every remainder of its stride, large
    ones among them: a padding might depend on more of the size than that.
    """
    generator = torch.Generator(device="cpu").manual_seed(1)
    smallest = max(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)) + 4
    sizes = ((smallest, smallest + 1), (smallest + 3, smallest + 2), (smallest, 1030), (1031, smallest), (129, 130))
    for height, width in sizes:
        x = torch.randn(2, _TWIN_CHANNELS, height, width, generator=generator, dtype=torch.float64, device="cpu")
        if padding.sides is None:
            vertical = same_padding(height, conv.kernel_size[0], conv.stride[0], conv.dilation[0])
            horizontal = same_padding(width, conv.kernel_size[1], conv.stride[1], conv.dilation[1])
            top, bottom, left, right = (*vertical, *horizontal)
        else:
            top, bottom, left, right = padding.sides
        padded = F.pad(x, (left, right, top, bottom))
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
        assert weight is not None
        wanted = F.conv2d(padded, weight, bias, conv.stride, 0, conv.dilation, conv.groups)
        try:
            found = conv(x)
        except Exception:  # as in _answers
            return False
        if not isinstance(found, Tensor) or not _equal(found, wanted):
            return False
    return True


def _sides(conv: nn.Conv2d) -> Sides:
    vertical, horizontal = int(conv.padding[0]), int(conv.padding[1])
    return vertical, vertical, horizontal, horizontal

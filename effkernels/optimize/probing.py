"""What a module or a function computes, found out by calling it instead of by knowing its name.

Libraries write the same activation as a module, as a function and as an autograd function of their own. Called on a
fixed float64 probe they tell themselves apart: silu is what returns silu's values. A convolution or a norm of an
unknown subclass is called as a twin of a few channels with random parameters, so that this costs the same for every
width and works for models on the meta device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import is_untouched
from effkernels.nn.padding import PaddedConv2d, explicit_padding, same_padding
from effkernels.reference import ACTIVATIONS, GATES, activate, apply_gate

_TOLERANCE = 1e-12  # float64 on values below 10: equal formulas agree to a few roundings, unlike ones differ by 1e-4
_TWIN_CHANNELS = 2

Sides = tuple[int, int, int, int]


@dataclass(frozen=True)
class Padding:
    """Zeros around the input of a convolution: the same on every call, or SAME for the size at hand.

    Attributes:
        sides: zeros at (top, bottom, left, right), in pixels; None: TensorFlow's SAME.
    """

    sides: Sides | None

    def around(self, sides: Sides) -> Padding | None:
        """This padding with more zeros around it; None where that has no fixed sides."""
        if self.sides is None:
            return self if sides == (0, 0, 0, 0) else None
        return Padding(tuple(a + b for a, b in zip(self.sides, sides, strict=True)))  # type: ignore[arg-type]


class Unknown(Exception):
    """A module or function is not what was looked for; the message says why, as it stands in a report."""


def probe() -> Tensor:
    """(2, 3, 5, 7), float64, on the CPU: values from -9 to 9 in an order that no axis follows."""
    count = 2 * 3 * 5 * 7
    order = (torch.arange(count, device="cpu") * 89) % count  # 89 is prime to the count: a permutation
    return torch.linspace(-9.0, 9.0, count, dtype=torch.float64, device="cpu")[order].reshape(2, 3, 5, 7)


def activation_of(function: Callable[[Tensor], Any]) -> str | None:
    """The name in `ACTIVATIONS` of an elementwise function ("identity" among them), or None."""
    found = _answer(function)
    return None if found is None else _activation_from(probe(), found)


def returns_its_input(function: Callable[[Tensor], Any]) -> bool:
    """Whether a function gives back the very tensor, or a view of it, and not a copy that may be written to."""
    x = probe()
    try:
        found = function(x)
    except Exception:  # as in _answer
        return False
    return isinstance(found, Tensor) and found.data_ptr() == x.data_ptr()


def gate_of(function: Callable[[Tensor], Any]) -> str | None:
    """The name in `GATES` of an elementwise function, or None."""
    x, found = probe(), _answer(function)
    return None if found is None else next((name for name in GATES if _equal(found, apply_gate(x, name))), None)


def is_mean_over_image(function: Callable[[Tensor], Any]) -> bool:
    """Whether a function takes (N, C, H, W) to its means, (N, C) or (N, C, 1, 1)."""
    x, found = probe(), _answer(function)
    if found is None or found.shape not in ((2, 3), (2, 3, 1, 1)):
        return False
    return _equal(found.flatten(1), x.mean((2, 3)))


def padding_of(conv: nn.Conv2d) -> Padding:
    """How a convolution pads its input, where its forward is nothing but a convolution of its own weight.

    Raises:
        Unknown: it is something else.
    """
    if conv.padding_mode != "zeros":
        raise Unknown(f"padding_mode={conv.padding_mode!r} is not zeros")
    own = explicit_padding(conv, 0, 0) if type(conv) is nn.Conv2d or isinstance(conv.padding, str) else _sides(conv)
    if type(conv) is nn.Conv2d:
        return Padding(own)
    candidates = [Padding(own), Padding(None)]
    if isinstance(conv, PaddedConv2d) and conv.native_size is not None:
        candidates.append(Padding(conv.padding_for(0, 0)))
    for child in conv.children():
        if isinstance(child, nn.ZeroPad2d):
            candidates.append(Padding(own).around(sides_of(child.padding)) or Padding(own))
    twin = _twin_of_conv(conv)
    for candidate in candidates:
        if _pads_like(twin, candidate):
            return candidate
    raise Unknown(f"the forward of {_class_name(conv)} is not a convolution of its weight with a padding known here")


def norm_activation_of(norm: BatchNorm) -> str:
    """The activation that a batch norm applies to what it normalised; "identity" for a plain one.

    Raises:
        Unknown: its forward is something else.
    """
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return "identity"
    generator = torch.Generator(device="cpu").manual_seed(0)
    mean, var, weight, bias = torch.rand(4, 3, generator=generator, dtype=torch.float64, device="cpu").add(0.5).unbind()
    twin = _twin(norm)
    count = torch.tensor(0, device="cpu")
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    twin.__dict__["_buffers"] = {"running_mean": mean, "running_var": var, "num_batches_tracked": count}
    x = probe()
    normalised = F.batch_norm(x, mean, var, weight, bias, training=False, eps=norm.eps)
    found = _answer(twin)
    activation = None if found is None else _activation_from(normalised, found)
    if activation is None:
        raise Unknown(f"the forward of {_class_name(norm)} is not a batch norm with an activation known here")
    return activation


def sides_of(padding: Any) -> Sides:
    """(top, bottom, left, right) of PyTorch's (left, right, top, bottom), or of one number for all."""
    left, right, top, bottom = (padding,) * 4 if isinstance(padding, int) else padding
    return int(top), int(bottom), int(left), int(right)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _answer(function: Callable[[Tensor], Any]) -> Tensor | None:
    """What a function makes of the probe; None where it cannot take it."""
    try:
        found = function(probe())
    except Exception:  # any error whatever only says that it is not the function looked for
        return None
    return found if isinstance(found, Tensor) and found.dtype == torch.float64 and found.is_cpu else None


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool(torch.allclose(found, wanted, rtol=0.0, atol=_TOLERANCE))


def _activation_from(x: Tensor, found: Tensor) -> str | None:
    return next((name for name in ACTIVATIONS if _equal(found, activate(x, name))), None)


def _twin(module: nn.Module) -> nn.Module:
    """A shallow copy in eval mode whose parameters can be replaced without touching the original."""
    twin = object.__new__(type(module))  # copy.copy goes through __getstate__, which some modules refuse
    twin.__dict__.update(module.__dict__)
    twin.training = False
    twin.__dict__["_modules"] = {name: copy.deepcopy(child).eval() for name, child in module.named_children()}
    return twin


def _twin_of_conv(conv: nn.Conv2d) -> nn.Conv2d:
    depthwise = conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1
    if conv.groups > 1 and not depthwise:
        raise Unknown(f"groups={conv.groups} of {conv.in_channels} channels is neither dense nor depthwise")
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (_TWIN_CHANNELS, 1 if depthwise else _TWIN_CHANNELS, *conv.kernel_size)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    bias = torch.randn(_TWIN_CHANNELS, generator=generator, dtype=torch.float64, device="cpu")
    twin = _twin(conv)
    assert isinstance(twin, nn.Conv2d)
    twin.in_channels = twin.out_channels = _TWIN_CHANNELS
    twin.groups = _TWIN_CHANNELS if depthwise else 1
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias)}
    return twin


def _pads_like(conv: nn.Conv2d, padding: Padding) -> bool:
    """Whether a twin computes a convolution with that padding, on sizes of every remainder of its stride."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    smallest = max(d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)) + 4
    for height, width in ((smallest, smallest + 1), (smallest + 3, smallest + 2)):
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
        except Exception:  # as in _answer
            return False
        if not isinstance(found, Tensor) or not _equal(found, wanted):
            return False
    return True


def _sides(conv: nn.Conv2d) -> Sides:
    vertical, horizontal = int(conv.padding[0]), int(conv.padding[1])
    return vertical, vertical, horizontal, horizontal


def untouched_tree(module: nn.Module) -> bool:
    """Whether nothing is attached to a module or to anything inside it."""
    return all(is_untouched(one) for one in module.modules())

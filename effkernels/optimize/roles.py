"""Find the role that each node of a traced graph can have in a chain that runs fused."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.nn.fusible import is_untouched
from effkernels.ops.backends import depthwise_kernel_problem
from effkernels.optimize.guarding import is_plain_tensor, replaced_method
from effkernels.optimize.probing import (
    Padding,
    Sides,
    activation_of,
    gate_of,
    is_mean_over_image,
    norm_activation_of,
    padding_of,
    returns_its_input,
    sides_of,
)
from effkernels.optimize.speed import is_faster_in_pytorch
from effkernels.optimize.tracing import PADS
from effkernels.optimize.twins import Twins
from effkernels.optimize.uniform import is_uniform
from effkernels.optimize.unknown import Unknown

_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_PRODUCTS = frozenset({operator.mul, operator.imul, torch.mul, "mul", "mul_"})
_IN_PLACE = frozenset({operator.iadd, operator.imul, operator.isub, operator.itruediv})
_RESHAPES = frozenset(
    {
        *("view", "reshape", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "contiguous"),
        *(torch.flatten, torch.unsqueeze, torch.squeeze, torch.reshape, operator.getitem),
    }
)
# Modules and functions of PyTorch that give the same values in every memory format and take any of them.
_FORMAT_FREE_MODULES = (
    *(nn.Conv2d, BatchNorm, nn.Dropout, nn.Dropout2d, nn.Identity, nn.ZeroPad2d, nn.ConstantPad2d),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_FORMAT_FREE_FUNCTIONS = frozenset({torch.cat, torch.concat, torch.concatenate})
_QUESTIONS = frozenset({"size", "dim", "numel", "stride", "is_contiguous"})


@dataclass(frozen=True)
class Convolution:
    """A convolution that an operator computes.

    Attributes:
        path: of the module, from the root of the trace.
        op: "pointwise_bn_act", "depthwise_bn_act" or "conv_bn_act".
        padding: zeros around its input.
        kernel_size: of both axes.
        stride, dilation: one for both axes.
        padding_mode: "zeros", or what `F.pad` puts around the input before: "reflect", "replicate", "circular".
        few_channels: too few to fill the vectors of the CPU's kernels.
    """

    path: str
    op: str
    padding: Padding
    kernel_size: tuple[int, int]
    stride: int
    dilation: int
    padding_mode: str = "zeros"
    few_channels: bool = False

    @property
    def is_spatial(self) -> bool:
        """Return whether it reads more than one pixel."""
        return self.kernel_size != (1, 1)


@dataclass(frozen=True)
class Role:
    """The role of a node: `kind`, and what is known about it in `value`.

    kind: conv (Convolution), linear, norm (its activation), act (name in ACTIVATIONS), gate (name in GATES), identity,
    copy, pool, pad (Sides), add, mul, reshape, question (about shapes), unit (already fused), opaque (reason).
    """

    kind: str
    value: Any = None


# Channels from which a depthwise convolution that nothing follows is the operator's, for channels_last tensors in
# float32 (see `program.takes_bare`). PyTorch's time divided by the operator's, one thread of two, AMD EPYC, kernels
# from 3x1 to 11x11: 64 channels at 56x56, batch 1 0.9 to 1.5, batch 8 1.8 to 2.3; 240 at 14x14 1.3 to 1.8 and
# 0.8 to 1.6; 960 at 7x7 1.3 to 1.7; but 8 channels at 256x256 0.6 to 1.0, and 3 channels 0.6 to 0.9.
FEWEST_CHANNELS_BARE = 16


class Roles:
    """The roles of the nodes of one graph, found at the first question and kept.

    Args:
        root: of the trace.
        units: ids of the modules that run a program of their own.
        refused: convolutions that must stay as they are, by path, with the reason.
        padded: convolutions whose input is padded SAME before they are called.
    """

    def __init__(
        self,
        root: nn.Module,
        units: frozenset[int],
        refused: Mapping[str, str],
        padded: frozenset[str] = frozenset(),
    ) -> None:
        self._root = root
        self._units = units
        self._refused = refused
        self._padded = padded
        self._known: dict[fx.Node, Role] = {}

    def of(self, node: fx.Node) -> Role:
        """Return the role of a node."""
        if node not in self._known:
            self._known[node] = self._find(node)
        return self._known[node]

    def _find(self, node: fx.Node) -> Role:
        if node.op == "call_module":
            return self._of_module(node)
        if node.op not in ("call_function", "call_method"):
            return Role("opaque", node.op)
        if node.target is getattr or node.target in _QUESTIONS:
            return Role("question")
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
        if node.target in _ADDITIONS or node.target in _PRODUCTS:
            if len(tensors) == len(node.args) == 2 and not node.kwargs:
                return Role("add" if node.target in _ADDITIONS else "mul")
            return Role("opaque", "arithmetic with a constant")
        if node.target in PADS:
            return _of_pad(node)
        if node.target in _RESHAPES:
            return Role("reshape")
        if len(node.all_input_nodes) == 1 and node.args and node.args[0] is node.all_input_nodes[0]:
            return self._of_function(node)
        return Role("opaque", "an operation of unknown meaning")

    def _of_module(self, node: fx.Node) -> Role:
        module = self._root.get_submodule(str(node.target))
        if id(module) in self._units:
            return Role("unit")
        if str(node.target) in self._refused:
            return Role("opaque", self._refused[str(node.target)])
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node) or node.kwargs:
            return Role("opaque", "called with more than one argument")
        for one in module.modules():
            replaced = replaced_method(one)
            if replaced or not is_untouched(one):
                return Role("opaque", f"its {replaced} was replaced" if replaced else "a hook is attached to it")
            if not all(map(is_plain_tensor, (*one._parameters.values(), *one._buffers.values()))):
                kinds = {type(t).__name__ for t in one._parameters.values() if not is_plain_tensor(t)}
                return Role("opaque", f"its weights are no plain tensors but {', '.join(sorted(kinds))}")
        try:
            if isinstance(module, nn.Conv2d):
                return Role("conv", _convolution(str(node.target), module, str(node.target) in self._padded))
            if isinstance(module, BatchNorm):
                return _of_norm(module)
        except Unknown as reason:
            return Role("opaque", str(reason))
        if type(module) is nn.Linear:
            return Role("linear")
        if isinstance(module, nn.ZeroPad2d) or (isinstance(module, nn.ConstantPad2d) and module.value == 0):
            return Role("pad", sides_of(module.padding))
        if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
            return Role("opaque", f"{type(module).__name__} is not known")
        twins = Twins(module, watched=True)
        role = _by_probe(twins.root)
        if role.kind == "opaque":
            return role
        if twins.written():
            return Role("opaque", f"{type(module).__name__} writes to its attribute {twins.written()}")
        if not is_uniform(module, may_reshape=role.kind == "pool"):
            return Role("opaque", f"what {type(module).__name__} does may depend on the size of the image")
        return role

    def _of_function(self, node: fx.Node) -> Role:

        def call(x: Any) -> Any:
            if node.op == "call_method":
                return getattr(x, str(node.target))(*node.args[1:], **node.kwargs)
            assert callable(node.target)
            return node.target(x, *node.args[1:], **node.kwargs)

        return _by_probe(call)


def _by_probe(function: Any) -> Role:
    activation = activation_of(function)
    if activation is not None:
        if activation == "identity":
            return Role("identity") if returns_its_input(function) else Role("copy")
        return Role("act", activation)
    gate = gate_of(function)
    if gate is not None:
        return Role("gate", gate)
    return Role("pool") if is_mean_over_image(function) else Role("opaque", "an operation of unknown meaning")


def _of_pad(node: fx.Node) -> Role:
    named = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    sides = named.get("pad")
    constant = named.get("mode", "constant") == "constant" and not named.get("value")
    if not constant or not isinstance(sides, tuple | list) or len(sides) != 4:
        return Role("opaque", "a padding other than zeros on four sides")
    if not all(isinstance(side, int) and side >= 0 for side in sides):
        return Role("opaque", "a padding that depends on the size of the input or cuts")
    return Role("pad", sides_of(tuple(sides)))


def _of_norm(norm: BatchNorm) -> Role:
    if norm.running_mean is None or norm.running_var is None:
        return Role("opaque", "the norm has no running statistics")
    return Role("norm", norm_activation_of(norm))


def _convolution(path: str, conv: nn.Conv2d, padded: bool) -> Convolution:
    """Return the convolution as an operator computes it; Unknown with the reason where none does."""
    (kernel, other), (stride, other_stride), (dilation, other_dilation) = conv.kernel_size, conv.stride, conv.dilation
    mode = conv.padding_mode if type(conv) is nn.Conv2d else "zeros"  # padding_of refuses others in subclasses
    padding = padding_of(conv)
    if padded and padding.sides == (0, 0, 0, 0) and dilation == 1:
        padding = Padding(None)
    if stride != other_stride or dilation != other_dilation:
        raise Unknown(f"stride={conv.stride} or dilation={conv.dilation} differs between the axes")
    if conv.groups == 1:
        if dilation != 1 and (kernel, other) != (1, 1):
            raise Unknown(f"dilation={dilation} of a dense convolution; allowed: 1")
        plain = (kernel, other, stride) == (1, 1, 1) and padding.sides in (None, (0, 0, 0, 0))
        is_on_cpu = conv.weight.device.type == "cpu"
        if is_on_cpu and is_faster_in_pytorch(conv.in_channels, conv.out_channels, (kernel, other)):
            raise Unknown(
                f"{conv.in_channels} input channels of a {kernel}x{other} convolution: PyTorch's is faster there"
            )
        op = "pointwise_bn_act" if plain else "conv_bn_act"
        return Convolution(path, op, padding, (kernel, other), stride, 1, mode)
    if conv.groups == conv.in_channels != conv.out_channels:
        raise Unknown(
            f"a depth multiplier of {conv.out_channels // conv.in_channels} ({conv.in_channels} to {conv.out_channels} "
            "channels); the depthwise operators take one filter a channel"
        )
    if not conv.groups == conv.in_channels:
        raise Unknown(f"groups={conv.groups} of {conv.in_channels} channels is neither dense nor depthwise")
    problem = depthwise_kernel_problem(kernel, other)
    if problem:
        raise Unknown(problem)
    if stride not in (1, 2):
        raise Unknown(f"stride={stride} of a depthwise convolution; allowed: 1, 2")
    few = conv.in_channels < FEWEST_CHANNELS_BARE and conv.weight.device.type == "cpu"
    return Convolution(path, "depthwise_bn_act", padding, (kernel, other), stride, dilation, mode, few)


def is_format_free(root: nn.Module, node: fx.Node, role: Role) -> bool:
    """Return whether a node accepts channels_last and contiguous inputs and gives the same values for both."""
    if node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), _FORMAT_FREE_MODULES):
        return True
    if node.op == "call_function" and node.target in _FORMAT_FREE_FUNCTIONS:
        return True
    return role.kind in (
        "conv",
        "norm",
        "act",
        "gate",
        "identity",
        "copy",
        "pool",
        "pad",
        "add",
        "mul",
        "question",
        "unit",
    )


def mutates(root: nn.Module, node: fx.Node, role: Role) -> bool:
    """Return whether a node may overwrite its first argument. Fused nodes do not: that was tested (`verifying`)."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if role.kind == "unit" or isinstance(module, nn.Conv2d | BatchNorm):
            return False  # a norm's own activation, in place or not, works on what it normalised
        return any(getattr(one, "inplace", False) is True for one in module.modules())
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    return (
        node.target in _IN_PLACE
        or node.kwargs.get("inplace") is True
        or (name.endswith("_") and not name.endswith("__"))
        or (True in node.args and name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "dropout"))
    )


__all__ = ["Convolution", "Role", "Roles", "Sides", "is_format_free", "mutates"]

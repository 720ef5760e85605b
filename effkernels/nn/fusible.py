"""Decide whether a chain of modules may run as one fused operator, and collect its parameters.

A fused operator computes what the modules would compute one after the other, but it does not call them. So it may only
replace modules of which every effect is known: exactly the expected classes, nothing attached to them. Whatever
else is found (training mode, a hook, a replaced method, a subclass, a parametrization, a norm without running
statistics, an activation that no operator has) is run as written. The decision reads the modules at every call, because
any of it may change in between.

The rule for what is looked at: everything that a call of the module would read. Its class decides which methods run, so
the class has to be one of those below, and no attribute of the instance may hide a method, a parameter or a
child (`is_untouched`). Its hooks run, so there has to be none. Its forward reads settings, parameters, buffers and
children, so each of them is either handed to the operator or compared with what the operator assumes. Where a class is
added here, its attributes belong into `_ATTRIBUTES` and what its forward reads into one of the functions.

Hooks registered for all modules at once (`torch.nn.modules.module.register_module_forward_hook` and its siblings) do
not count: observers such as `FlopCounterMode` use them, and measuring must not change what is measured. They see the
outer module.

Modules, parameters and buffers are taken from the dicts that hold them. Reached as attributes they go through
`nn.Module.__getattr__`, with which the Python of a block took some 40 microseconds instead of 8: over the 16 blocks of
B0 half a millisecond, where the whole network runs in a few.
"""

from __future__ import annotations

from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn

from effkernels._norm import Norm
from effkernels.nn.drop_path import DropPath
from effkernels.nn.norm_act import BatchNormAct2d, SyncBatchNormAct
from effkernels.nn.padding import PaddedConv2d
from effkernels.ops.backends import depthwise_kernel_problem

NormAct: TypeAlias = "tuple[Norm, str]"

_CONVOLUTIONS = (nn.Conv2d, PaddedConv2d)
_PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_NORMS_WITH_ACTIVATION = (BatchNormAct2d, SyncBatchNormAct)
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hard_swish",
    nn.GELU: "gelu",
}
_GATES: dict[type[nn.Module], str] = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}

# What an instance of each class has in its __dict__: any other name may hide a method of the class.
_ATTRIBUTES: dict[type[nn.Module], frozenset[str]] = {
    type(module): frozenset(module.__dict__)
    for module in (
        nn.Conv2d(1, 1, 1, device="meta"),
        PaddedConv2d(1, 1, 1, device="meta"),
        nn.BatchNorm2d(1, device="meta"),
        nn.SyncBatchNorm(1, device="meta"),
        BatchNormAct2d(1, device="meta"),
        SyncBatchNormAct(1, device="meta"),
        DropPath(),
        *(cls() for cls in (*_ACTIVATIONS, *_GATES)),
    )
}
_ATTRIBUTE_COUNTS = {cls: len(names) for cls, names in _ATTRIBUTES.items()}

_tracing_state = torch._C._get_tracing_state


def calls_modules(x: Tensor) -> bool:
    """Return whether modules are always called: under torch.jit.trace, and where x is no tensor but a proxy
    of torch.fx. Both record the calls that they see, and those of the plain modules hold for other users.
    """
    return not isinstance(x, Tensor) or _tracing_state() is not None


def is_watched() -> bool:
    """Return whether a mode sees calls of PyTorch's functions (`torch.overrides.TorchFunctionMode`).

    A compiled graph makes none that it could see.
    """
    return not torch.compiler.is_compiling() and torch._C._is_torch_function_mode_enabled()


def is_untouched(module: nn.Module) -> bool:
    """Return whether `module` has nothing attached that a call of it would run: no hook, no replaced method."""
    attributes = module.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return False
    return len(attributes) == _ATTRIBUTE_COUNTS.get(type(module)) or _replaces_nothing(module)


def _replaces_nothing(module: nn.Module) -> bool:
    """Return whether no attribute of the instance hides what a call would find in its class or among its parts.

    Offloading libraries replace `forward` on the instance, others `_conv_forward`; `module.compile()` sets
    `_compiled_call_impl`. Of a class that is not in `_ATTRIBUTES` only the methods of a call are looked at.
    """
    cls, attributes = type(module), module.__dict__
    if cls not in _ATTRIBUTES:
        return not ("forward" in attributes or "_call_impl" in attributes or "_compiled_call_impl" in attributes)
    usual = _ATTRIBUTES[cls]
    return not any(
        hasattr(cls, name) or name in module._parameters or name in module._buffers or name in module._modules
        for name in attributes
        if name not in usual
    )


def activation_of(module: nn.Module | None) -> str | None:
    """Return the activation that `module` is, one of `effkernels.ops.reference.ACTIVATIONS`; None for anything else."""
    name = None if module is None else _ACTIVATIONS.get(type(module))
    if module is None or name is None or not is_untouched(module):
        return None
    if name == "gelu":
        assert isinstance(module, nn.GELU)
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    if name == "relu6":
        assert isinstance(module, nn.ReLU6)
        return name if (module.min_val, module.max_val) == (0.0, 6.0) else None
    return name


def gate_of(module: nn.Module | None) -> str | None:
    """Return the gate that `module` is, one of `effkernels.ops.reference.GATES`; None for anything else."""
    name = None if module is None else _GATES.get(type(module))
    return name if module is not None and name is not None and is_untouched(module) else None


def fusible_norm(norm: nn.Module | None, activation: str) -> NormAct | None:
    """Return what a norm that uses its running statistics passes to an operator; None for anything else.

    Args:
        norm: with its activation (`BatchNormAct2d`), or a batch norm of PyTorch.
        activation: of the block, which a batch norm of PyTorch without a child `act` gets (see `norm_act`).

    Returns:
        The norm, and the activation that follows.
    """
    if norm is None or norm.training:
        return None
    found = activation_after(norm, activation)
    if found is None:
        return None
    parameters, buffers = parameters_of(norm), norm._buffers
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    if mean is None or var is None:
        return None
    eps: Any = norm.eps
    return Norm(mean, var, parameters["weight"], parameters["bias"], eps), found


def activation_after(norm: nn.Module, activation: str) -> str | None:
    """Return the activation that `norm` ends with if it is a batch norm that does what it seems to do; else None.

    Arguments as of `fusible_norm`.
    """
    if not is_untouched(norm):
        return None
    children = norm._modules
    if type(norm) in _NORMS_WITH_ACTIVATION or (type(norm) in _PLAIN_NORMS and "act" in children):
        drop = children.get("drop")
        if len(children) != 2 or type(drop) is not nn.Identity or not is_untouched(drop):
            return None
        found = activation_of(children["act"])
    elif type(norm) in _PLAIN_NORMS:
        found = activation
    else:
        return None
    parameters = parameters_of(norm)
    if "weight" not in parameters or "bias" not in parameters:  # taken out, as old parametrizations do
        return None
    return found


def conv_arguments(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a convolution."""
    parameters = parameters_of(conv)
    return parameters["weight"], parameters["bias"]


def _is_plain(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return True for a convolution that does what it seems to do."""
    if (
        not isinstance(conv, nn.Conv2d)
        or type(conv) not in _CONVOLUTIONS
        or conv.padding_mode != "zeros"
        or not is_untouched(conv)
    ):
        return False
    parameters = parameters_of(conv)
    return "weight" in parameters and "bias" in parameters  # else taken out, as old parametrizations do


def _is_square(value: object) -> bool:
    """Return whether a stride or a dilation is one number for both axes, written as PyTorch's constructors write it."""
    return isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]


def _pads_explicitly(conv: nn.Conv2d) -> bool:
    """Return whether `explicit_padding` knows the padding."""
    return isinstance(conv.padding, str) or (isinstance(conv.padding, tuple) and len(conv.padding) == 2)


def is_fusible_pointwise(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return True for a plain 1x1 convolution: stride 1, no padding, one group."""
    return (
        _is_plain(conv)
        and conv_arguments(conv)[0].shape[2:] == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
    )


def is_fusible_depthwise(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return True for a depthwise convolution that the operators know: one filter a channel, stride 1 or 2."""
    if not _is_plain(conv):
        return False
    channels, depth, height, width = conv_arguments(conv)[0].shape
    return (
        conv.groups == channels
        and depth == 1
        and not depthwise_kernel_problem(height, width)
        and conv.stride in ((1, 1), (2, 2))
        and (conv.dilation == (1, 1) or _is_square(conv.dilation))
        and _pads_explicitly(conv)
    )


def is_fusible_dense(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Return True for a dense convolution: one group, one stride for both axes, no dilation."""
    return (
        _is_plain(conv)
        and conv.groups == 1
        and _is_square(conv.stride)
        and conv.dilation == (1, 1)
        and _pads_explicitly(conv)
    )


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return a module's values for `weight` and `bias`, by name.

    In a replica of `nn.DataParallel` they are plain attributes, except for those that are None.
    """
    parameters = module._parameters
    if "weight" in parameters:
        return parameters
    return {**parameters, **module.__dict__} if parameters else module.__dict__

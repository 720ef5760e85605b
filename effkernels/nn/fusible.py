"""When a chain of modules may run as one fused operator, and how their parameters are handed to it.

A fused operator computes what the modules would compute one after the other, but it does not call them. So it may only
stand in for modules of which every effect is known: exactly the expected classes, nothing attached to them. Whatever
else is found (training mode, a hook, a replaced `forward`, a subclass, a parametrization, a norm without running
statistics) is run as written. The decision reads the modules at every call, because any of it may change in between.

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
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from effkernels.backends import DEPTHWISE_KERNEL_SIZES
from effkernels.nn.padding import PaddedConv2d

NormArguments: TypeAlias = "tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]"
ConvNormArguments: TypeAlias = (
    "tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]"
)

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_CONVOLUTIONS = (nn.Conv2d, PaddedConv2d)


_tracing_state = torch._C._get_tracing_state


def calls_modules(x: Tensor) -> bool:
    """True where the modules are called whatever they are: under torch.jit.trace, and where x is no tensor but a proxy
    of torch.fx. Both record the calls that they see, and those of the plain modules hold for other users.
    """
    return not isinstance(x, Tensor) or _tracing_state() is not None


def is_untouched(module: nn.Module) -> bool:
    """True where nothing is attached to `module` that a call of it would run: no hook, no replaced `forward`."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # as offloading libraries replace it, on the instance
    )


def norm_arguments(norm: BatchNorm) -> NormArguments:
    """(norm_weight, norm_bias, norm_mean, norm_var, eps) of a batch norm, in the order the operators take them."""
    parameters, buffers = parameters_of(norm), norm._buffers
    return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"], norm.eps


def fusible_norm(norm: nn.Module | None) -> NormArguments | None:
    """`norm_arguments` of a batch norm that normalises by its running statistics; None for anything else."""
    if not isinstance(norm, BatchNorm) or type(norm) not in _NORMS or norm.training or not is_untouched(norm):
        return None
    arguments = norm_arguments(norm)
    return None if arguments[2] is None or arguments[3] is None else arguments


def conv_arguments(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a convolution."""
    parameters = parameters_of(conv)
    return parameters["weight"], parameters["bias"]


def conv_norm_arguments(conv: nn.Conv2d, norm: NormArguments) -> ConvNormArguments:
    """(weight, bias, norm_weight, norm_bias, norm_mean, norm_var, eps): what every fused convolution takes after x."""
    return *conv_arguments(conv), *norm


def is_fusible_pointwise(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """True for a plain 1x1 convolution: stride 1, no padding, one group."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in _CONVOLUTIONS
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.groups == 1
        and conv.padding in ((0, 0), "valid", "same")
        and is_untouched(conv)
    )


def is_fusible_depthwise(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """True for a depthwise convolution that the operators know: one filter a channel, square kernel, stride 1 or 2."""
    if not isinstance(conv, nn.Conv2d) or type(conv) not in _CONVOLUTIONS or not is_untouched(conv):
        return False
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and kernel[0] == kernel[1]
        and kernel[0] in DEPTHWISE_KERNEL_SIZES
        and stride[0] == stride[1]
        and stride[0] in (1, 2)
        and dilation[0] == dilation[1]
        and conv.padding_mode == "zeros"
    )


def is_fusible_dense(conv: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """True for a dense convolution: one group, one stride for both axes, no dilation."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in _CONVOLUTIONS
        and conv.groups == 1
        and conv.stride[0] == conv.stride[1]
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and is_untouched(conv)
    )


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module by name. In a replica of `nn.DataParallel` they are plain attributes."""
    return module._parameters or module.__dict__

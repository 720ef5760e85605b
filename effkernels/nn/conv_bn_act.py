"""A convolution with its batch norm and activation, fused in eval mode."""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
import torch
from torch import Tensor, nn

from effkernels import ops
from effkernels.nn.fusible import (
    calls_modules,
    conv_arguments,
    fusible_norm,
    is_fusible_dense,
    is_fusible_depthwise,
    is_fusible_pointwise,
    is_watched,
)
from effkernels.nn.norm_act import BatchNormAct2d, norm_act, not_scriptable
from effkernels.nn.padding import PaddedConv2d, explicit_padding
from effkernels.nn.training_norm import in_training_format, train_norm_act
from effkernels.ops import backends
from effkernels.ops.reference import ACTIVATIONS, canonical_name


def check_activation(owner: str, activation: str, argument: str = "activation") -> str:
    """Return the name in `ACTIVATIONS`, or raise ValueError naming the owner, the argument and what is allowed."""
    name: str = canonical_name(activation)
    if name not in ACTIVATIONS:
        raise ValueError(f"{owner}: {argument}={activation!r} is not known; allowed: {', '.join(ACTIVATIONS)}")
    return name


def check_backend(owner: str, backend: str) -> str:
    """Return `backend`, or raise ValueError naming the owner and what is allowed."""
    if backend != "auto" and backend not in backends.BACKENDS:
        raise ValueError(f"{owner}: backend={backend!r} is not known; allowed: auto, {', '.join(backends.BACKENDS)}")
    return backend


def conv_bn_act(x: Tensor, conv: nn.Module, norm: nn.Module, activation: str, backend: str = "auto") -> Tensor:
    """Compute `norm(conv(x))` with its activation, as one fused operator where the modules allow it.

    They allow it in eval mode, when both are what they seem (see `effkernels.nn.fusible`) and the convolution is 1x1,
    depthwise or dense; otherwise the modules are called one after the other. In training mode norm and activation are
    one operator, which saves its input alone for the backward (`effkernels.nn.training`).

    Args:
        x: (N, C, H, W), floating.
        conv: the convolution.
        norm: the batch norm.
        activation: that follows a batch norm without one of its own, one of `effkernels.ops.reference.ACTIVATIONS`; a
            `BatchNormAct2d` has one.
        backend: that runs it, one of `effkernels.ops.backends.BACKENDS`; "auto": as
            `effkernels.backend` asks.

    Returns:
        (N, C', H', W') in x's dtype (under autocast in autocast's); channels_last where it ran fused.
    """
    fusible = fusible_norm(norm, activation)
    if fusible is None or calls_modules(x):
        z = conv(in_training_format(x, norm, backend))
        trained = train_norm_act(norm, z, activation, backend)
        return norm_act(norm, z, activation) if trained is None else trained
    running, follows = fusible
    if is_fusible_pointwise(conv):
        return ops.pointwise_bn_act(x, *conv_arguments(conv), running, activation=follows, backend=backend)
    if is_fusible_depthwise(conv):
        return ops.depthwise_bn_act(
            x,
            *conv_arguments(conv),
            running,
            stride=conv.stride[0],
            padding=explicit_padding(conv, x.shape[2], x.shape[3]),
            dilation=conv.dilation[0],
            activation=follows,
            backend=backend,
        )
    if is_fusible_dense(conv):
        return ops.conv_bn_act(
            x,
            *conv_arguments(conv),
            running,
            stride=conv.stride[0],
            padding=explicit_padding(conv, x.shape[2], x.shape[3]),
            activation=follows,
            backend=backend,
        )
    return norm_act(norm, conv(x), activation)


def conv_bn_act_pool(
    x: Tensor, conv: nn.Module, norm: nn.Module, activation: str, backend: str = "auto"
) -> Tensor | None:
    """Compute the means over the image of `conv_bn_act`, as one fused operator that never writes the image.

    Args:
        x, conv, norm, activation, backend: as of `conv_bn_act`.

    Returns:
        (N, C') in x's dtype; None where the modules have to be called, where the convolution is not 1x1, and where a
        mode watches the functions of PyTorch: whoever does that waits for the mean (as class activation maps do).
    """
    if is_watched() or calls_modules(x) or not is_fusible_pointwise(conv):
        return None
    fusible = fusible_norm(norm, activation)
    if fusible is None:
        return None
    running, follows = fusible
    return ops.pointwise_bn_act_pool(x, *conv_arguments(conv), running, activation=follows, backend=backend)


class ConvBnAct(nn.Module):
    """Convolution, batch norm and activation; parameters `conv`, `bn1`, the activation is `bn1.act`.

    Equivalent PyTorch: `bn1(conv(x))` with `conv` a `PaddedConv2d` without bias and `bn1` a `BatchNormAct2d`.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups: of the convolution; groups == in_channels ==
            out_channels makes it depthwise.
        activation: one of `effkernels.ops.reference.ACTIVATIONS`.
        pad_type: one of `effkernels.nn.PAD_TYPES` but `"same_native"`.
        bn_eps, bn_momentum: of the batch norm.
        backend: that runs the operator, one of `effkernels.ops.backends.BACKENDS`; "auto": as
            `effkernels.backend` asks.
        device, dtype: of the parameters.

    Raises:
        ValueError: activation, pad_type or backend unknown.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        activation: str = "silu",
        pad_type: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._activation = check_activation("ConvBnAct", activation)
        self.backend = check_backend("ConvBnAct", backend)
        self.conv = PaddedConv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            dilation=dilation,
            groups=groups,
            pad_type=pad_type,
            device=device,
            dtype=dtype,
        )
        self.bn1 = BatchNormAct2d(
            out_channels, eps=bn_eps, momentum=bn_momentum, activation=activation, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W); returns (N, out_channels, H', W'), channels_last where it ran fused."""
        return conv_bn_act(x, self.conv, self.bn1, self._activation, self.backend)

    def __prepare_scriptable__(self) -> nn.Module:
        return not_scriptable(self)

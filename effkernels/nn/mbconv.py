"""The mobile inverted bottleneck (Sandler et al. 2018; with squeeze-and-excitation Tan and Le 2019, table 1).

In eval mode a block is two or three fused operators: the 1x1 expand, the depthwise convolution with its norm,
activation and the squeeze-and-excitation gate, and the 1x1 project that multiplies by the gate as it reads and adds the
residual as it writes. On the CPU they are cut elsewhere: expand and depthwise in one, the gate by itself, the project.
On a GPU in 16-bit types a block is one operator, which plans whether it is one launch or several.
In training mode a block is one operator, forward and backward (`effkernels.nn.training`).
"""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
import functools
from typing import Any

import torch
from torch import Tensor, nn

from effkernels import ops
from effkernels.nn.conv_bn_act import check_activation, check_backend
from effkernels.nn.drop_path import DropPath
from effkernels.nn.fusible import (
    NormAct,
    calls_modules,
    conv_arguments,
    fusible_norm,
    is_fusible_depthwise,
    is_fusible_pointwise,
    is_untouched,
)
from effkernels.nn.norm_act import BatchNormAct2d, norm_act, not_scriptable
from effkernels.nn.padding import PaddedConv2d, explicit_padding
from effkernels.nn.squeeze_excite import SqueezeExcite, SqueezeExciteArguments, fusible_squeeze_excite
from effkernels.nn.training import train_block
from effkernels.ops import backends

# The depthwise convolution of a block and its norm, squeeze-and-excitation, the 1x1 projection and its norm.
_FusibleParts = tuple[nn.Conv2d, NormAct, SqueezeExciteArguments | None, nn.Conv2d, NormAct]


class DepthwiseSeparable(nn.Module):
    """MBConv with expansion 1: depthwise, squeeze-and-excitation, project; parameters `conv_dw, bn1, se, conv_pw, bn2`.

    Equivalent PyTorch: `drop_path(bn2(conv_pw(se(bn1(conv_dw(x)))))) + x`, the sum only where `has_skip`. The norms are
    `BatchNormAct2d`: the activation is `bn1.act`, and `bn2.act` is the identity.

    Args:
        in_channels, out_channels: of the block.
        kernel_size, stride, dilation: of the depthwise convolution.
        se_channels: width of the squeeze-and-excitation; 0 leaves it out.
        activation: after the depthwise convolution and inside the squeeze-and-excitation (unless `se_activation` says
            otherwise), one of `effkernels.ops.reference.ACTIVATIONS`.
        se_activation: the activation inside the squeeze-and-excitation; None: `activation`.
        gate_activation: one of `effkernels.ops.reference.GATES`.
        skip: add the input where stride is 1 and the channels agree.
        drop_path_rate: probability of dropping the branch of a sample in training.
        pad_type: one of `effkernels.nn.PAD_TYPES` but `"same_native"`.
        bn_eps, bn_momentum: of the batch norms.
        backend: that runs the operators, one of `effkernels.ops.backends.BACKENDS`; "auto": as
            `effkernels.backend` asks.
        device, dtype: of the parameters.

    Raises:
        ValueError: activation, gate_activation, pad_type or backend unknown, drop_path_rate not a probability.
    """

    recompute: str | None = None  # what the backward computes again: see `effkernels.nn.set_recompute`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        dilation: int = 1,
        se_channels: int = 0,
        activation: str = "silu",
        se_activation: str | None = None,
        gate_activation: str = "sigmoid",
        skip: bool = True,
        drop_path_rate: float = 0.0,
        pad_type: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = functools.partial(BatchNormAct2d, eps=bn_eps, momentum=bn_momentum, device=device, dtype=dtype)
        self._activation = check_activation("DepthwiseSeparable", activation)
        self.backend = check_backend("DepthwiseSeparable", backend)
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv_dw = PaddedConv2d(
            in_channels,
            in_channels,
            kernel_size,
            stride,
            dilation=dilation,
            groups=in_channels,
            pad_type=pad_type,
            device=device,
            dtype=dtype,
        )
        self.bn1 = norm(in_channels, activation=activation)
        self.se = _squeeze_excite(
            in_channels, se_channels, se_activation or activation, gate_activation, factory_kwargs
        )
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory_kwargs)
        self.bn2 = norm(out_channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W); returns (N, out_channels, H', W'), channels_last where it ran fused."""
        parts = None if calls_modules(x) else self._fusible_parts()
        if parts is None:
            y = train_block(self, x)
            return self._forward_plain(x) if y is None else y
        backend, residual = self.backend, x if self.has_skip else None
        if backends.takes_block(x, backend):
            arguments = _block_arguments(parts, x.shape[2], x.shape[3])
            return ops.mbconv(x, expand_weight=None, **arguments, residual=residual, backend=backend)
        depthwise, norm1, se, project, norm2 = parts
        y, gate = _depthwise(x, depthwise, norm1, se, backend)
        return _project(y, project, norm2, gate, residual, backend)

    def operator_arguments(self, height: int, width: int) -> dict[str, Any] | None:
        """Return the arguments of the block as an entry of `effkernels.ops.mbconv_stack`, for x: (N, C, height, width).

        None where a module of the block has to be called: a hook, training mode, a replaced part.
        """
        parts = self._fusible_parts()
        return None if parts is None else {**_block_arguments(parts, height, width), "residual": self.has_skip}

    def _fusible_parts(self) -> _FusibleParts | None:
        """Return what the operators take in place of calls of the block's modules; None where one has to be called."""
        of = self._modules
        return _fusible_parts(
            of["conv_dw"], of["bn1"], of["se"], of["conv_pw"], of["bn2"], of["drop_path"], self._activation
        )

    def _forward_plain(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.conv_dw(x), self._activation)
        z = norm_act(self.bn2, self.conv_pw(self.se(y)), "identity")
        return x + self.drop_path(z) if self.has_skip else z

    def __prepare_scriptable__(self) -> nn.Module:
        return not_scriptable(self)

    def extra_repr(self) -> str:
        return f"has_skip={self.has_skip}"


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, squeeze-and-excitation, project.

    Parameters `conv_pw, bn1, conv_dw, bn2, se, conv_pwl, bn3`. Equivalent PyTorch, the last sum only where `has_skip`:
    `drop_path(bn3(conv_pwl(se(bn2(conv_dw(bn1(conv_pw(x)))))))) + x`. The norms are `BatchNormAct2d`: the activations
    are `bn1.act` and `bn2.act`, and `bn3.act` is the identity.

    Args:
        in_channels, out_channels: of the block.
        kernel_size, stride, dilation: of the depthwise convolution.
        expansion: the block is in_channels * expansion wide inside.
        others: as of `DepthwiseSeparable`, which is the block for expansion 1.

    Raises:
        ValueError: as of `DepthwiseSeparable`, or expansion below 1.
    """

    recompute: str | None = None  # what the backward computes again: see `effkernels.nn.set_recompute`

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        expansion: int = 6,
        dilation: int = 1,
        se_channels: int = 0,
        activation: str = "silu",
        se_activation: str | None = None,
        gate_activation: str = "sigmoid",
        skip: bool = True,
        drop_path_rate: float = 0.0,
        pad_type: str = "",
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"MBConv: expansion={expansion} must be at least 1")
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = functools.partial(BatchNormAct2d, eps=bn_eps, momentum=bn_momentum, device=device, dtype=dtype)
        expanded = in_channels * expansion
        self._activation = check_activation("MBConv", activation)
        self.backend = check_backend("MBConv", backend)
        self.has_skip = skip and stride == 1 and in_channels == out_channels
        self.conv_pw = nn.Conv2d(in_channels, expanded, 1, bias=False, **factory_kwargs)
        self.bn1 = norm(expanded, activation=activation)
        self.conv_dw = PaddedConv2d(
            expanded,
            expanded,
            kernel_size,
            stride,
            dilation=dilation,
            groups=expanded,
            pad_type=pad_type,
            device=device,
            dtype=dtype,
        )
        self.bn2 = norm(expanded, activation=activation)
        self.se = _squeeze_excite(expanded, se_channels, se_activation or activation, gate_activation, factory_kwargs)
        self.conv_pwl = nn.Conv2d(expanded, out_channels, 1, bias=False, **factory_kwargs)
        self.bn3 = norm(out_channels)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, in_channels, H, W); returns (N, out_channels, H', W'), channels_last where it ran fused."""
        parts = None if calls_modules(x) else self._fusible_parts()
        if parts is None:
            y = train_block(self, x)
            return self._forward_plain(x) if y is None else y
        backend = self.backend
        residual = x if self.has_skip else None
        expand, norm1, others = parts
        if backends.takes_block(x, backend):
            arguments = {**_expand_arguments(expand, norm1), **_block_arguments(others, x.shape[2], x.shape[3])}
            return ops.mbconv(x, **arguments, residual=residual, backend=backend)
        depthwise, norm2, se, project, norm3 = others
        if _keeps_expanded(x, backend):
            y, gate = _expand_depthwise(x, expand, norm1, depthwise, norm2, se, backend)
        else:
            norm, activation = norm1
            y = ops.pointwise_bn_act(x, *conv_arguments(expand), norm, activation=activation, backend=backend)
            y, gate = _depthwise(y, depthwise, norm2, se, backend)
        return _project(y, project, norm3, gate, residual, backend)

    def operator_arguments(self, height: int, width: int) -> dict[str, Any] | None:
        """Return the arguments of the block as an entry of `effkernels.ops.mbconv_stack`, for x: (N, C, height, width).

        None where a module of the block has to be called: a hook, training mode, a replaced part.
        """
        parts = self._fusible_parts()
        if parts is None:
            return None
        expand, norm1, others = parts
        arguments = {**_expand_arguments(expand, norm1), **_block_arguments(others, height, width)}
        return {**arguments, "residual": self.has_skip}

    def _fusible_parts(self) -> tuple[nn.Conv2d, NormAct, _FusibleParts] | None:
        """Return what the operators take in place of calls of the block's modules; None where one has to be called."""
        of = self._modules
        others = _fusible_parts(
            of["conv_dw"], of["bn2"], of["se"], of["conv_pwl"], of["bn3"], of["drop_path"], self._activation
        )
        expand, norm1 = of["conv_pw"], fusible_norm(of["bn1"], self._activation)
        if others is None or norm1 is None or not is_fusible_pointwise(expand):
            return None
        return expand, norm1, others

    def _forward_plain(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.conv_pw(x), self._activation)
        y = norm_act(self.bn2, self.conv_dw(y), self._activation)
        z = norm_act(self.bn3, self.conv_pwl(self.se(y)), "identity")
        return x + self.drop_path(z) if self.has_skip else z

    def __prepare_scriptable__(self) -> nn.Module:
        return not_scriptable(self)

    def extra_repr(self) -> str:
        return f"has_skip={self.has_skip}"


def _squeeze_excite(
    channels: int, se_channels: int, activation: str, gate_activation: str, factory_kwargs: dict[str, Any]
) -> nn.Module:
    if se_channels == 0:
        return nn.Identity()
    return SqueezeExcite(
        channels, se_channels, activation=activation, gate_activation=gate_activation, **factory_kwargs
    )


def _fusible_parts(
    depthwise: nn.Module | None,
    norm: nn.Module | None,
    se: nn.Module | None,
    project: nn.Module | None,
    project_norm: nn.Module | None,
    drop_path: nn.Module | None,
    activation: str,
) -> _FusibleParts | None:
    found, found_project = fusible_norm(norm, activation), fusible_norm(project_norm, "identity")
    excitation = fusible_squeeze_excite(se)
    if (
        found is None
        or found_project is None
        or (excitation is None and not _is_nothing(se))
        or not is_fusible_depthwise(depthwise)
        or not is_fusible_pointwise(project)
        or not _is_idle(drop_path)
    ):
        return None
    return depthwise, found, excitation, project, found_project


def _is_nothing(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and is_untouched(module)


def _is_idle(drop_path: nn.Module | None) -> bool:
    """Return whether `drop_path` would return its input. Norms may be frozen in eval while it still drops."""
    if isinstance(drop_path, DropPath) and type(drop_path) is DropPath:
        return (drop_path.rate == 0.0 or not drop_path.training) and is_untouched(drop_path)
    return _is_nothing(drop_path)


def _depthwise(
    x: Tensor, conv: nn.Conv2d, norm: NormAct, se: SqueezeExciteArguments | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Depthwise convolution, norm and activation of x: (N, C, H, W), and the gate (N, C) where there is one."""
    padding = explicit_padding(conv, x.shape[2], x.shape[3])
    stride, dilation = conv.stride[0], conv.dilation[0]
    arguments, activation = (x, *conv_arguments(conv), norm[0]), norm[1]
    if se is None:
        y = ops.depthwise_bn_act(
            *arguments, stride=stride, padding=padding, dilation=dilation, activation=activation, backend=backend
        )
        return y, None
    return ops.depthwise_bn_act_gate(
        *arguments,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        backend=backend,
        **se,
    )


def _project(
    y: Tensor, conv: nn.Conv2d, norm: NormAct, gate: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    """1x1 convolution of the gated y, norm and residual."""
    running, activation = norm
    return ops.pointwise_bn_act(
        y,
        *conv_arguments(conv),
        running,
        gate=gate,
        residual=residual,
        activation=activation,
        backend=backend,
    )


def _block_arguments(parts: _FusibleParts, height: int, width: int) -> dict[str, Any]:
    """Return the arguments of `effkernels.ops.mbconv` but x, expansion and residual, for x: (N, C, height, width)."""
    conv, norm, se, project, project_norm = parts
    weight, bias = conv_arguments(conv)
    project_weight, project_bias = conv_arguments(project)
    excitation: dict[str, Any] = {} if se is None else dict(se)
    return {
        "weight": weight,
        "bias": bias,
        "norm": norm[0],
        "stride": conv.stride[0],
        "padding": explicit_padding(conv, height, width),
        "dilation": conv.dilation[0],
        "activation": norm[1],
        **excitation,
        "project_weight": project_weight,
        "project_bias": project_bias,
        "project_norm": project_norm[0],
    }


def _expand_arguments(expand: nn.Conv2d, norm: NormAct) -> dict[str, Any]:
    weight, bias = conv_arguments(expand)
    return {"expand_weight": weight, "expand_bias": bias, "expand_norm": norm[0], "expand_activation": norm[1]}


def _keeps_expanded(x: Tensor, backend: str) -> bool:
    """Return whether the expanded tensor of a block is never written to memory.

    The CPU kernel takes the depthwise rows out of the cache where it has just expanded them. On a GPU the depthwise
    operator computes the gate on its side; after `expand_depthwise_squeeze` the gate would take a launch of its own.
    """
    return x.is_cpu and (backends.selected() if backend == "auto" else backend) in ("auto", "cpu")


def _expand_depthwise(
    x: Tensor,
    expand: nn.Conv2d,
    expand_norm: NormAct,
    conv: nn.Conv2d,
    norm: NormAct,
    se: SqueezeExciteArguments | None,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """1x1 convolution and depthwise convolution of x: (N, C, H, W), each with norm and activation, and the gate."""
    expand_weight, expand_bias = conv_arguments(expand)
    weight, bias = conv_arguments(conv)
    y, pooled = ops.expand_depthwise_squeeze(
        x,
        expand_weight,
        weight,
        expand_bias=expand_bias,
        expand_norm=expand_norm[0],
        expand_activation=expand_norm[1],
        bias=bias,
        norm=norm[0],
        stride=conv.stride[0],
        padding=explicit_padding(conv, x.shape[2], x.shape[3]),
        dilation=conv.dilation[0],
        activation=norm[1],
        backend=backend,
    )
    if se is None:
        return y, None
    return y, ops.squeeze_excite_gate(
        pooled,
        se["w_reduce"],
        se["b_reduce"],
        se["w_expand"],
        se["b_expand"],
        activation=se["se_activation"],
        gate_activation=se["gate_activation"],
        backend=backend,
    )

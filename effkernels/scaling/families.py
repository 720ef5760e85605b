"""Baselines to scale: EfficientNet-B0, MobileNetV1, MobileNetV2 and ResNet-50, built of fused operators.

Their stages are the tables of their papers. Everything is made of the modules of effkernels.nn, so that a scaled
network runs on the same kernels as EfficientNet does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.models import BASELINE, Architecture, EfficientNet
from effkernels.models.architecture import Stage as TableRow
from effkernels.nn import ConvBnAct, DepthwiseSeparable, MBConv
from effkernels.scaling.network import Stage, StagedNetwork

Layer = Callable[..., nn.Module]


class DepthwiseThenPointwise(nn.Module):
    """MobileNetV1's layer: depthwise and 1x1 convolution, each with norm and ReLU (Howard et al. 2017, figure 3)."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, **place: Any) -> None:
        super().__init__()
        self.depthwise = ConvBnAct(
            in_channels, in_channels, kernel_size, stride, groups=in_channels, activation="relu", **place
        )
        self.pointwise = ConvBnAct(in_channels, channels, 1, activation="relu", **place)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class Bottleneck(nn.Module):
    """ResNet's layer: reduce, 3x3, expand, and the input added before the last ReLU (He et al. 2016, figure 5).

    The stride is that of the 3x3 convolution, as every library has it today.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int, *, expansion: int, **place: Any
    ) -> None:
        super().__init__()
        inner = max(1, channels // expansion)
        self.reduce = ConvBnAct(in_channels, inner, 1, activation="relu", **place)
        self.conv = ConvBnAct(inner, inner, kernel_size, stride, activation="relu", **place)
        self.expand = ConvBnAct(inner, channels, 1, activation="identity", **place)
        changes = stride != 1 or in_channels != channels
        self.shortcut: nn.Module = nn.Identity()
        if changes:
            self.shortcut = ConvBnAct(in_channels, channels, 1, stride, activation="identity", **place)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C, H / stride, W / stride)."""
        return torch.relu(self.expand(self.conv(self.reduce(x))) + self.shortcut(x))


def _conv(
    in_channels: int, channels: int, kernel_size: int, stride: int, *, activation: str, **place: Any
) -> nn.Module:
    return ConvBnAct(in_channels, channels, kernel_size, stride, activation=activation, **place)


def _max_pool(in_channels: int, channels: int, kernel_size: int, stride: int, **place: Any) -> nn.Module:
    if in_channels != channels:
        raise ValueError(f"max_pool: {in_channels} channels in, {channels} out; allowed: as many out as in")
    return nn.MaxPool2d(kernel_size, stride, kernel_size // 2)


def _inverted_residual(
    in_channels: int,
    channels: int,
    kernel_size: int,
    stride: int,
    *,
    expansion: int,
    activation: str,
    se_ratio: float = 0.0,
    skip: bool = True,
    **place: Any,
) -> nn.Module:
    options: dict[str, Any] = {
        "activation": activation,
        "skip": skip,
        "se_channels": max(1, round(in_channels * se_ratio)) if se_ratio else 0,
    }
    if expansion == 1:
        return DepthwiseSeparable(in_channels, channels, kernel_size, stride, **options, **place)
    return MBConv(in_channels, channels, kernel_size, stride, expansion=expansion, **options, **place)


OPERATORS: dict[str, Layer] = {
    "conv": _conv,
    "max_pool": _max_pool,
    "depthwise_separable": DepthwiseThenPointwise,
    "inverted_residual": _inverted_residual,
    "bottleneck": Bottleneck,
}
"""The operators of `build_sequential`: layer(in_channels, channels, kernel_size, stride, **options, device, dtype)."""


class SequentialNetwork(nn.Module):
    """Stages, pooling, classifier: `stages.S.L`, `classifier`.

    Args:
        network: its stages, whose operators are words of `OPERATORS`.
        num_classes: of the classifier.
        in_chans: channels of an image.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        network: StagedNetwork,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        stages, channels = [], in_chans
        for stage in network.stages:
            if stage.operator not in OPERATORS:
                raise ValueError(f"{network.name}: operator={stage.operator!r}; allowed: {', '.join(OPERATORS)}")
            layers = []
            for number in range(stage.layers):
                stride = stage.stride if number == 0 else 1
                layers.append(
                    OPERATORS[stage.operator](
                        channels, stage.channels, stage.kernel_size, stride, **stage.options, device=device, dtype=dtype
                    )
                )
                channels = stage.channels
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.num_features = channels
        self.classifier = nn.Linear(channels, num_classes, device=device, dtype=dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, num_features, H', W') of images (N, in_chans, H, W)."""
        y: Tensor = self.stages(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        logits: Tensor = self.classifier(self.forward_features(x).mean((2, 3)))
        return logits


def build_sequential(network: StagedNetwork, **options: Any) -> SequentialNetwork:
    """Return the builder of a network whose operators are words of `OPERATORS`."""
    return SequentialNetwork(network, **options)


def _stage(operator: str, layers: int, channels: int, stride: int = 1, kernel_size: int = 3, **options: Any) -> Stage:
    return Stage(operator, layers, channels, stride, kernel_size, options)


def _once(operator: str, channels: int, stride: int = 1, kernel_size: int = 3, **options: Any) -> Stage:
    """Return a stem or a head: widened with the network, never repeated."""
    return Stage(operator, 1, channels, stride, kernel_size, options, deepens=False)


def build_efficientnet(network: StagedNetwork, **options: Any) -> EfficientNet:
    """Return the network as effkernels.models builds it, with timm's names."""
    stem, *rows, head = network.stages
    return EfficientNet(
        Architecture(
            stem_channels=stem.channels,
            stages=tuple(
                TableRow(row.options["expansion"], row.kernel_size, row.stride, row.channels, row.layers)
                for row in rows
            ),
            head_channels=head.channels,
            se_ratio=rows[0].options["se_ratio"],
            activation=rows[0].options["activation"],
        ),
        **options,
    )


BUILDERS: dict[str, Callable[..., nn.Module]] = {"sequential": build_sequential, "efficientnet": build_efficientnet}
"""Builders by their names in a saved network."""


def _mbconv(row: TableRow) -> Stage:
    options: dict[str, Any] = {
        "expansion": row.expansion,
        "se_ratio": BASELINE.se_ratio,
        "activation": BASELINE.activation,
    }
    return _stage("inverted_residual", row.layers, row.channels, row.stride, row.kernel_size, **options)


EFFICIENTNET_B0 = StagedNetwork(
    "EfficientNet-B0",
    224,
    (
        _once("conv", BASELINE.stem_channels, 2, activation=BASELINE.activation),
        *(_mbconv(row) for row in BASELINE.stages),
        _once("conv", BASELINE.head_channels, 1, 1, activation=BASELINE.activation),
    ),
    build_efficientnet,
)
"""Table 1 of the EfficientNet paper."""

MOBILENET_V1 = StagedNetwork(
    "MobileNetV1",
    224,
    (
        _once("conv", 32, 2, activation="relu"),
        _stage("depthwise_separable", 1, 64),
        _stage("depthwise_separable", 2, 128, 2),
        _stage("depthwise_separable", 2, 256, 2),
        _stage("depthwise_separable", 6, 512, 2),
        _stage("depthwise_separable", 2, 1024, 2),
    ),
    build_sequential,
)
"""Howard et al. 2017, table 1."""

_V2: dict[str, Any] = {"activation": "relu6"}
MOBILENET_V2 = StagedNetwork(
    "MobileNetV2",
    224,
    (
        _once("conv", 32, 2, **_V2),
        _stage("inverted_residual", 1, 16, expansion=1, **_V2),
        _stage("inverted_residual", 2, 24, 2, expansion=6, **_V2),
        _stage("inverted_residual", 3, 32, 2, expansion=6, **_V2),
        _stage("inverted_residual", 4, 64, 2, expansion=6, **_V2),
        _stage("inverted_residual", 3, 96, expansion=6, **_V2),
        _stage("inverted_residual", 3, 160, 2, expansion=6, **_V2),
        _stage("inverted_residual", 1, 320, expansion=6, **_V2),
        _once("conv", 1280, 1, 1, **_V2),
    ),
    build_sequential,
)
"""Sandler et al. 2018, table 2."""

RESNET_50 = StagedNetwork(
    "ResNet-50",
    224,
    (
        _once("conv", 64, 2, 7, activation="relu"),
        _once("max_pool", 64, 2),
        _stage("bottleneck", 3, 256, expansion=4),
        _stage("bottleneck", 4, 512, 2, expansion=4),
        _stage("bottleneck", 6, 1024, 2, expansion=4),
        _stage("bottleneck", 3, 2048, 2, expansion=4),
    ),
    build_sequential,
)
"""He et al. 2016, table 1."""

BASELINES: dict[str, StagedNetwork] = {
    "efficientnet_b0": EFFICIENTNET_B0,
    "mobilenet_v1": MOBILENET_V1,
    "mobilenet_v2": MOBILENET_V2,
    "resnet50": RESNET_50,
}
"""By the name that the command line knows them by."""

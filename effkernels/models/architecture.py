"""The baseline network as table 1 of the EfficientNet paper prints it, and how a width and a depth scale it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effkernels.models.compound import ScalingCoefficients, round_filters, round_repeats


@dataclass(frozen=True)
class Stage:
    """A row of table 1.

    Attributes:
        expansion: of the MBConv blocks; 1 has no expand convolution.
        kernel_size: of the depthwise convolution.
        stride: of the stage's first block; the others have 1.
        channels: out of every block of the stage.
        layers: number of blocks.
    """

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    layers: int


@dataclass(frozen=True)
class Architecture:
    """A stem, stages of MBConv blocks, a head.

    Attributes:
        stem_channels: out of the first convolution (3x3, stride 2).
        stages: rows of table 1.
        head_channels: out of the last convolution (1x1).
        se_ratio: squeeze-and-excitation width as a share of the channels that enter the block; 0: none.
        activation: one of `effkernels.ops.reference.ACTIVATIONS`.
    """

    stem_channels: int
    stages: tuple[Stage, ...]
    head_channels: int
    se_ratio: float = 0.25
    activation: str = "silu"

    def scaled(self, coefficients: ScalingCoefficients, *, fix_stem_head: bool = False) -> Architecture:
        """Return the network with its channels scaled by `coefficients.width` and its layers by `coefficients.depth`.

        With `fix_stem_head` the channels of stem and head and the layers of the first and the last stage stay, as in
        the lite variants.
        """
        width, depth = coefficients.width, coefficients.depth
        ends = (0, len(self.stages) - 1) if fix_stem_head else ()
        stages = tuple(
            replace(
                stage,
                channels=round_filters(stage.channels, width),
                layers=stage.layers if position in ends else round_repeats(stage.layers, depth),
            )
            for position, stage in enumerate(self.stages)
        )
        if fix_stem_head:
            return replace(self, stages=stages)
        return replace(
            self,
            stem_channels=round_filters(self.stem_channels, width),
            stages=stages,
            head_channels=round_filters(self.head_channels, width),
        )


BASELINE = Architecture(
    stem_channels=32,
    stages=(
        Stage(expansion=1, kernel_size=3, stride=1, channels=16, layers=1),
        Stage(expansion=6, kernel_size=3, stride=2, channels=24, layers=2),
        Stage(expansion=6, kernel_size=5, stride=2, channels=40, layers=2),
        Stage(expansion=6, kernel_size=3, stride=2, channels=80, layers=3),
        Stage(expansion=6, kernel_size=5, stride=1, channels=112, layers=3),
        Stage(expansion=6, kernel_size=5, stride=2, channels=192, layers=4),
        Stage(expansion=6, kernel_size=3, stride=1, channels=320, layers=1),
    ),
    head_channels=1280,
)
"""EfficientNet-B0 (table 1). Strides are those of a stage's first block, which is where the released models put them;
the table prints the resolution that enters a stage.
"""

LITE_BASELINE = replace(BASELINE, se_ratio=0.0, activation="relu6")
"""EfficientNet-Lite0: B0 without squeeze-and-excitation and with ReLU6, both for integer hardware."""

"""Numbers of the EfficientNet paper (Tan and Le 2019), as printed, for comparison with what is counted."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

VARIANTS = MappingProxyType(
    {
        "b0": ("5.3", "0.39"),
        "b1": ("7.8", "0.70"),
        "b2": ("9.2", "1.0"),
        "b3": ("12", "1.8"),
        "b4": ("19", "4.2"),
        "b5": ("30", "9.9"),
        "b6": ("43", "19"),
        "b7": ("66", "37"),
    }
)
"""Table 2: millions of parameters, and billions of FLOPS (multiply-adds)."""


@dataclass(frozen=True)
class ScaledFamily:
    """A line of table 3, or of table 7.

    Attributes:
        network: key of `effkernels.scaling.families.BASELINES`.
        table: where the paper prints it.
        depth, width, resolution: factors.
        gflops: as printed.
        coefficients: "paper" where it prints the factors, "ours" where it does not.
    """

    network: str
    table: str
    depth: float
    width: float
    resolution: float
    gflops: str
    coefficients: str = "paper"

    @property
    def way(self) -> str:
        """Return which dimensions are scaled."""
        factors = {"depth": self.depth, "width": self.width, "resolution": self.resolution}
        scaled = [name for name, factor in factors.items() if factor != 1.0]
        return "baseline" if not scaled else scaled[0] if len(scaled) == 1 else "compound"


FAMILIES: tuple[ScaledFamily, ...] = (
    ScaledFamily("mobilenet_v1", "3", 1, 1, 1, "0.6"),
    ScaledFamily("mobilenet_v1", "3", 1, 2, 1, "2.2"),
    ScaledFamily("mobilenet_v1", "3", 1, 1, 2, "2.2"),
    ScaledFamily("mobilenet_v1", "3", 1.4, 1.2, 1.3, "2.3"),
    ScaledFamily("mobilenet_v2", "3", 1, 1, 1, "0.3"),
    ScaledFamily("mobilenet_v2", "3", 4, 1, 1, "1.2"),
    ScaledFamily("mobilenet_v2", "3", 1, 2, 1, "1.1"),
    ScaledFamily("mobilenet_v2", "3", 1, 1, 2, "1.2"),
    ScaledFamily("mobilenet_v2", "3", 1.3, 1.2, 1.3, "1.3", coefficients="ours"),
    ScaledFamily("resnet50", "3", 1, 1, 1, "4.1"),
    ScaledFamily("resnet50", "3", 4, 1, 1, "16.2"),
    ScaledFamily("resnet50", "3", 1, 2, 1, "14.7"),
    ScaledFamily("resnet50", "3", 1, 1, 2, "16.4"),
    ScaledFamily("resnet50", "3", 1.4, 1.2, 1.35, "16.7", coefficients="ours"),
    ScaledFamily("efficientnet_b0", "7", 1, 1, 1, "0.4"),
    ScaledFamily("efficientnet_b0", "7", 4, 1, 1, "1.8"),
    ScaledFamily("efficientnet_b0", "7", 1, 2, 1, "1.8"),
    ScaledFamily("efficientnet_b0", "7", 1, 1, 2, "1.9"),
    ScaledFamily("efficientnet_b0", "7", 1.4, 1.2, 1.3, "1.8"),
)
"""Table 3 (MobileNetV1, MobileNetV2, ResNet-50) and the networks of table 7, whose activation maps figure 7 shows.

The paper prints no factors for the compound MobileNetV2 and ResNet-50. Ours are those of MobileNetV1 with the one
changed (depth of MobileNetV2, resolution of ResNet-50) that brings the count to the paper's FLOPS.
"""

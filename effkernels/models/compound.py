"""The arithmetic of compound scaling (Tan and Le 2019, "EfficientNet", section 3.3).

Nothing here knows of networks: this file imports nothing else of the project, and the model tables build on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ScalingCoefficients:
    """The factors by which one network is scaled from the baseline.

    Attributes:
        width: factor on the number of channels.
        depth: factor on the number of layers of each stage.
        resolution: height and width of the input, in pixels.
        dropout: probability of dropping a feature in front of the classifier.
    """

    width: float
    depth: float
    resolution: int
    dropout: float


@dataclass(frozen=True)
class CompoundScaling:
    """Equation 3: depth = alpha ** phi, width = beta ** phi, resolution = gamma ** phi.

    FLOPs grow with depth * width ** 2 * resolution ** 2, so with (alpha * beta ** 2 * gamma ** 2) ** phi; the paper
    asks for alpha * beta ** 2 * gamma ** 2 close to 2, so that phi counts doublings.

    Attributes:
        alpha, beta, gamma: at least 1; the shares of depth, width and resolution.

    Raises:
        ValueError: one of them below 1 or not finite.
    """

    alpha: float
    beta: float
    gamma: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1.0):
                raise ValueError(f"CompoundScaling: {name}={value} must be finite and at least 1")

    def depth(self, phi: float) -> float:
        """Factor on the number of layers."""
        return math.pow(self.alpha, phi)

    def width(self, phi: float) -> float:
        """Factor on the number of channels."""
        return math.pow(self.beta, phi)

    def resolution(self, phi: float) -> float:
        """Factor on the height and the width of the input."""
        return math.pow(self.gamma, phi)

    def flops(self, phi: float) -> float:
        """Factor on the FLOPs of a regular convolution network, before any rounding."""
        return math.pow(self.alpha * self.beta**2 * self.gamma**2, phi)


EFFICIENTNET = CompoundScaling(alpha=1.2, beta=1.1, gamma=1.15)
"""The coefficients that the paper found by grid search on the baseline B0 (section 5, step 1)."""

PUBLISHED: Mapping[str, ScalingCoefficients] = MappingProxyType(
    {
        "b0": ScalingCoefficients(width=1.0, depth=1.0, resolution=224, dropout=0.2),
        "b1": ScalingCoefficients(width=1.0, depth=1.1, resolution=240, dropout=0.2),
        "b2": ScalingCoefficients(width=1.1, depth=1.2, resolution=260, dropout=0.3),
        "b3": ScalingCoefficients(width=1.2, depth=1.4, resolution=300, dropout=0.3),
        "b4": ScalingCoefficients(width=1.4, depth=1.8, resolution=380, dropout=0.4),
        "b5": ScalingCoefficients(width=1.6, depth=2.2, resolution=456, dropout=0.4),
        "b6": ScalingCoefficients(width=1.8, depth=2.6, resolution=528, dropout=0.5),
        "b7": ScalingCoefficients(width=2.0, depth=3.1, resolution=600, dropout=0.5),
    }
)
"""The coefficients of B0 to B7 as the authors released them: equation 3 at growing phi, rounded by hand."""

PUBLISHED_LITE: Mapping[str, ScalingCoefficients] = MappingProxyType(
    {
        "lite0": ScalingCoefficients(width=1.0, depth=1.0, resolution=224, dropout=0.2),
        "lite1": ScalingCoefficients(width=1.0, depth=1.1, resolution=240, dropout=0.2),
        "lite2": ScalingCoefficients(width=1.1, depth=1.2, resolution=260, dropout=0.3),
        "lite3": ScalingCoefficients(width=1.2, depth=1.4, resolution=280, dropout=0.3),
        "lite4": ScalingCoefficients(width=1.4, depth=1.8, resolution=300, dropout=0.3),
    }
)
"""The coefficients of the lite variants (tensorflow/tpu, models/official/efficientnet/lite); they leave stem and head
as they are.
"""


def round_filters(filters: int, width: float, divisor: int = 8) -> int:
    """Return the channels after scaling by `width`: the nearest multiple of `divisor`, at most 10 % below the product.

    The released models use divisor 8 (their `round_filters`).

    Raises:
        ValueError: an argument that is not positive.
    """
    if filters < 1 or width <= 0 or divisor < 1:
        raise ValueError(f"round_filters: filters={filters}, width={width}, divisor={divisor} must be positive")
    scaled = filters * width
    nearest = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return nearest if nearest >= 0.9 * scaled else nearest + divisor


def round_repeats(layers: int, depth: float) -> int:
    """Return the layers of a stage after scaling by `depth`, rounded up (the released models' `round_repeats`).

    Raises:
        ValueError: an argument that is not positive.
    """
    if layers < 1 or depth <= 0:
        raise ValueError(f"round_repeats: layers={layers}, depth={depth} must be positive")
    return math.ceil(layers * depth)

"""Compound scaling: one coefficient grows depth, width and resolution of a network together."""

from __future__ import annotations

from effkernels.scaling.compound import (
    EFFICIENTNET,
    PUBLISHED,
    CompoundScaling,
    ScalingCoefficients,
    round_filters,
    round_repeats,
)

__all__ = [
    "EFFICIENTNET",
    "PUBLISHED",
    "CompoundScaling",
    "ScalingCoefficients",
    "round_filters",
    "round_repeats",
]

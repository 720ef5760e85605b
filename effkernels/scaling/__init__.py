"""Compound scaling: one coefficient grows depth, width and resolution of a network together.

`effkernels.models` builds on `scaling.compound`, and the networks to scale are built of `effkernels.models`: what needs
them is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from effkernels.models.compound import (
    EFFICIENTNET,
    PUBLISHED,
    CompoundScaling,
    ScalingCoefficients,
    round_filters,
    round_repeats,
)

if TYPE_CHECKING:
    from effkernels.scaling.baseline_search import SearchSpace, search_baseline
    from effkernels.scaling.budget import Budget, Fit, fit
    from effkernels.scaling.candidates import Candidate
    from effkernels.scaling.catalog import find_network
    from effkernels.scaling.coefficient_search import search
    from effkernels.scaling.counting import Cost
    from effkernels.scaling.families import BASELINES, EFFICIENTNET_B0, MOBILENET_V1, MOBILENET_V2, RESNET_50
    from effkernels.scaling.files import load_network, save_network
    from effkernels.scaling.latency import MeasuredLatency, PlannedLatency, fit_latency
    from effkernels.scaling.network import Network, Rounding, Stage, StagedNetwork, scale
    from effkernels.scaling.sources import BuiltNetwork, from_builder, from_timm, from_torchvision

_LATE = {
    "baseline_search": ("SearchSpace", "search_baseline"),
    "budget": ("Budget", "Fit", "fit"),
    "candidates": ("Candidate",),
    "catalog": ("find_network",),
    "coefficient_search": ("search",),
    "counting": ("Cost",),
    "families": ("BASELINES", "EFFICIENTNET_B0", "MOBILENET_V1", "MOBILENET_V2", "RESNET_50"),
    "files": ("load_network", "save_network"),
    "latency": ("MeasuredLatency", "PlannedLatency", "fit_latency"),
    "network": ("Network", "Rounding", "Stage", "StagedNetwork", "scale"),
    "sources": ("BuiltNetwork", "from_builder", "from_timm", "from_torchvision"),
}

__all__ = [
    "BASELINES",
    "EFFICIENTNET",
    "EFFICIENTNET_B0",
    "MOBILENET_V1",
    "MOBILENET_V2",
    "PUBLISHED",
    "RESNET_50",
    "Budget",
    "BuiltNetwork",
    "Candidate",
    "CompoundScaling",
    "Cost",
    "Fit",
    "MeasuredLatency",
    "Network",
    "PlannedLatency",
    "Rounding",
    "ScalingCoefficients",
    "SearchSpace",
    "Stage",
    "StagedNetwork",
    "find_network",
    "fit",
    "fit_latency",
    "from_builder",
    "from_timm",
    "from_torchvision",
    "load_network",
    "round_filters",
    "round_repeats",
    "save_network",
    "scale",
    "search",
    "search_baseline",
]


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _LATE.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

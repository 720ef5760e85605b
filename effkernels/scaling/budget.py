"""Equation 2: constraints on what a network costs, and the largest scaling that keeps them (Tan and Le 2019)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Generic

from effkernels.models.compound import EFFICIENTNET, CompoundScaling
from effkernels.scaling.counting import Cost
from effkernels.scaling.network import N, Rounding, scale

ALONG: tuple[str, ...] = ("compound", "depth", "width", "resolution")
_FARTHEST = 10  # doublings of the FLOPs: some 1000 times the baseline, and as much below it


@dataclass(frozen=True)
class Budget:
    """The constraints of equation 2: Memory(N) <= target memory, FLOPS(N) <= target FLOPs.

    Attributes:
        multiply_adds: most multiply-adds of one image.
        activation_bytes: most bytes that training one image keeps for its backward (`Cost.activation_bytes`).
        parameters: most parameters.
            None: no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    multiply_adds: float | None = None
    activation_bytes: float | None = None
    parameters: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not limit > 0:
                raise ValueError(f"Budget: {name}={limit}; allowed: above 0, or None for no limit")

    def limits(self) -> dict[str, float]:
        """Return the limits that are set, by the name of the `Cost` attribute they hold for."""
        values = {limit.name: getattr(self, limit.name) for limit in fields(self)}
        return {name: float(limit) for name, limit in values.items() if limit is not None}

    def exceeded(self, cost: Cost) -> list[str]:
        """Return names of the limits that a cost exceeds."""
        return [name for name, limit in self.limits().items() if getattr(cost, name) > limit]


@dataclass(frozen=True)
class Fit(Generic[N]):
    """The largest network within a budget.

    Attributes:
        network: the scaled network.
        cost: what it costs, counted.
        phi: the compound coefficient; None if one dimension alone was scaled.
        depth, width, resolution: the factors, before rounding.
        limited_by: the limits that the next larger network exceeds.
    """

    network: N
    cost: Cost
    phi: float | None
    depth: float
    width: float
    resolution: float
    limited_by: tuple[str, ...]


def fit(
    network: N,
    budget: Budget | None = None,
    *,
    max_multiply_adds: float | None = None,
    max_activation_bytes: float | None = None,
    max_parameters: float | None = None,
    along: str = "compound",
    scaling: CompoundScaling = EFFICIENTNET,
    rounding: Rounding | None = None,
    tolerance: float = 0.005,
) -> Fit[N]:
    """Scale a network as far as a budget allows, up or down: the solution of equation 2 along one way of scaling.

    Costs are counted, not predicted. As layers, channels and pixels are whole numbers they grow in steps, and bisection
    finds the last step that the budget allows.

    Args:
        network: the baseline.
        budget: the constraints, or the next three one by one.
        max_multiply_adds, max_activation_bytes, max_parameters: see `Budget`.
        along: "compound" (phi grows), "depth", "width" or "resolution" (that one alone).
        scaling: alpha, beta, gamma of "compound".
        rounding: how layers, channels and pixels become whole numbers.
        tolerance: the steps are resolved to this many doublings of the FLOPs that equation 3 predicts.

    Returns:
        A network within the budget; one scaled further by `tolerance` is outside of it.

    Raises:
        ValueError: no constraint, an unknown `along`, a budget below the smallest network, or one that scaling this
            way never reaches (resolution does not change the number of parameters).
    """
    if budget is None:
        budget = Budget(max_multiply_adds, max_activation_bytes, max_parameters)
    elif (max_multiply_adds, max_activation_bytes, max_parameters) != (None, None, None):
        raise ValueError("fit: a budget and max_... are given; allowed: one of them")
    if not budget.limits():
        raise ValueError("fit: no constraint; give max_multiply_adds, max_activation_bytes or max_parameters")
    if along not in ALONG:
        raise ValueError(f"fit: along={along!r}; allowed: {', '.join(ALONG)}")
    if not tolerance > 0:
        raise ValueError(f"fit: tolerance={tolerance}; allowed: above 0")
    factors = _factors(along, scaling)

    def candidate(doublings: float) -> N:
        depth, width, resolution = factors(doublings)
        return scale(network, depth=depth, width=width, resolution=resolution, rounding=rounding)

    inside, outside = _bracket(lambda t: not budget.exceeded(candidate(t).cost()), network.name, along, budget)
    while outside - inside > tolerance:
        middle = (inside + outside) / 2
        if budget.exceeded(candidate(middle).cost()):
            outside = middle
        else:
            inside = middle
    found, depth_width_resolution = candidate(inside), factors(inside)
    phi = inside / math.log2(scaling.flops(1)) if along == "compound" else None
    limited_by = tuple(budget.exceeded(candidate(outside).cost()))
    return Fit(found, found.cost(), phi, *depth_width_resolution, limited_by)


def _factors(along: str, scaling: CompoundScaling) -> Callable[[float], tuple[float, float, float]]:
    """Depth, width and resolution that multiply the FLOPs of a regular network by 2 ** doublings."""
    if along == "compound":
        if scaling.flops(1) <= 1.0:
            raise ValueError(f"fit: {scaling} does not grow; allowed: one of alpha, beta, gamma above 1")
        step = math.log2(scaling.flops(1))
        return lambda t: (scaling.depth(t / step), scaling.width(t / step), scaling.resolution(t / step))
    if along == "depth":
        return lambda t: (2.0**t, 1.0, 1.0)
    if along == "width":
        return lambda t: (1.0, 2.0 ** (t / 2), 1.0)
    return lambda t: (1.0, 1.0, 2.0 ** (t / 2))


def _bracket(inside: Callable[[float], bool], name: str, along: str, budget: Budget) -> tuple[float, float]:
    """Doublings just one apart of which the first is within the budget and the second is not."""
    limits = ", ".join(f"{key}={limit:g}" for key, limit in budget.limits().items())
    at = 0.0
    if inside(at):
        while inside(at + 1):
            at += 1
            if at >= _FARTHEST:
                raise ValueError(f"fit: scaling {name} along {along} never reaches {limits}")
        return at, at + 1
    while not inside(at - 1):
        at -= 1
        if at <= -_FARTHEST:
            raise ValueError(f"fit: {name} exceeds {limits} however small it is scaled along {along}")
    return at - 1, at

"""Step 1's candidates: alpha, beta, gamma under the constraint of equation 3, and the networks they make."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import nn

from effkernels.models.compound import CompoundScaling
from effkernels.scaling.counting import Cost
from effkernels.scaling.network import Network, StagedNetwork

LAST_DIGIT = 6  # of alpha, beta, gamma and phi, as keys and messages show them


@dataclass(frozen=True)
class Candidate:
    """A scaled network to be evaluated.

    Attributes:
        key: it is known by in journals and messages.
        network: the scaled network.
        scaling: alpha, beta, gamma.
        phi: the compound coefficient.
        cost: what it costs, counted, with the classifier and the images it is evaluated with.
        num_classes, in_chans: of what `build` returns.
        latency_ms: of one forward, where it was asked for.
    """

    key: str
    network: Network
    scaling: CompoundScaling
    phi: float
    cost: Cost
    num_classes: int
    in_chans: int
    latency_ms: float | None = None

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the network in training mode, weights at random: (N, in_chans, H, W) to (N, num_classes)."""
        return self.network.build(num_classes=self.num_classes, in_chans=self.in_chans, device=device, dtype=dtype)


def key_of(scaling: CompoundScaling) -> str:
    """Return the key of coefficients: "alpha=1.2 beta=1.1 gamma=1.15"."""
    values = {"alpha": scaling.alpha, "beta": scaling.beta, "gamma": scaling.gamma}
    return " ".join(f"{name}={round(value, LAST_DIGIT):g}" for name, value in values.items())


def identity(network: Network) -> Hashable:
    """Equal for two scalings of a baseline that round to the same network, whatever built them."""
    if isinstance(network, StagedNetwork):
        return network
    return network.resolution, tuple(network.rows()), network.cost()


def on_grid(constraint: float = 2.0, *, grid: float = 0.05, tolerance: float = 0.1) -> list[CompoundScaling]:
    """Return all alpha, beta, gamma >= 1 on a grid whose alpha * beta^2 * gamma^2 is near a constraint (equation 3).

    Args:
        constraint: what alpha * beta^2 * gamma^2 is to be, above 1: the growth of the FLOPs from phi = 0 to 1.
        grid: step of the three.
        tolerance: share of the constraint by which it may be missed.

    Returns:
        In the order of their distance to the constraint, so that of several that round to one network the closest
        is first.

    Raises:
        ValueError: an argument that is out of its range, or a grid without a point.
    """
    check_constraint(constraint)
    if not grid > 0:
        raise ValueError(f"grid={grid}; allowed: above 0")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}; allowed: from 0 to below 1")
    most = constraint * (1 + tolerance) + 1e-9
    found: list[tuple[float, CompoundScaling]] = []
    values = [round(1 + number * grid, 10) for number in range(int((most - 1) / grid) + 1)]
    for alpha in values:
        for beta in values:
            for gamma in values:
                growth = alpha * beta**2 * gamma**2
                if growth > most:
                    break
                distance = abs(growth - constraint)
                if distance <= tolerance * constraint + 1e-9:
                    found.append((round(distance, 9), CompoundScaling(alpha, beta, gamma)))
    if not found:
        raise ValueError(
            f"no alpha, beta, gamma on a grid of {grid:g} are within {tolerance:g} of constraint={constraint:g}; "
            "allowed: a finer grid or a wider tolerance"
        )
    return [scaling for _, scaling in sorted(found, key=lambda pair: pair[0])]


def by_shares(constraint: float, of_depth: float, of_rest: float) -> CompoundScaling:
    """Coefficients that meet a constraint exactly, by who bears how much of the growth.

    Args:
        constraint: what alpha * beta^2 * gamma^2 is, above 1.
        of_depth: share of depth in its logarithm, from 0 to 1.
        of_rest: share of width in what depth leaves over, from 0 to 1; resolution has the rest.
    """
    check_constraint(constraint)
    for name, share in (("of_depth", of_depth), ("of_rest", of_rest)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}; allowed: from 0 to 1")
    of_width = (1 - of_depth) * of_rest
    of_resolution = (1 - of_depth) * (1 - of_rest)
    exponents = (of_depth, of_width / 2, of_resolution / 2)
    return CompoundScaling(*(max(1.0, round(constraint**exponent, LAST_DIGIT)) for exponent in exponents))


def check_constraint(constraint: float) -> None:
    """ValueError where a constraint does not let the FLOPs grow."""
    if not (math.isfinite(constraint) and constraint > 1):
        raise ValueError(f"constraint={constraint}; allowed: above 1, such as 2 for doubled FLOPs")

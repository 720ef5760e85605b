"""Scaling to a latency instead of to FLOPs, which the paper could not do: measured here, or planned for a named GPU.

FLOPs approximate time, and not closely: a depthwise convolution has few of them and moves as many bytes as a
dense one. Here the time itself is the constraint of equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol

import torch
from torch import nn

from effkernels import environment
from effkernels.bench import timing
from effkernels.models.compound import EFFICIENTNET, CompoundScaling
from effkernels.plan import gpus
from effkernels.plan.launches import PRECISIONS, plan_call
from effkernels.plan.record import record_calls
from effkernels.scaling.candidates import identity, on_grid
from effkernels.scaling.counting import Cost
from effkernels.scaling.network import N, Network, Rounding, TooManyLayersError, scale

ALONE: dict[str, CompoundScaling] = {
    "depth": CompoundScaling(2.0, 1.0, 1.0),
    "width": CompoundScaling(1.0, math.sqrt(2.0), 1.0),
    "resolution": CompoundScaling(1.0, 1.0, math.sqrt(2.0)),
}
"""One dimension alone, as coefficients by which phi counts doublings of the FLOPs too."""

_FARTHEST = 10  # doublings of the FLOPs: some 1000 times the baseline, and as much below it


class OutOfReach(ValueError):
    """A latency that scaling one way does not come to: below the smallest network, or above the largest."""


class Latency(Protocol):
    """Returns the latency of a network."""

    @property
    def description(self) -> str:
        """Device, batch size and precision, and whether it is measured or planned; two of one text are comparable."""

    @property
    def is_measured(self) -> bool:
        """Return whether it is measured; planned latencies are lower bounds."""

    def __call__(self, network: Network) -> float:
        """Return the milliseconds of one forward in inference mode, of a whole batch."""


@dataclass(frozen=True)
class MeasuredLatency:
    """Latency measured on this machine: median of calls after a warm-up, in inference mode, with the fused kernels.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        batch_size: images of a call.
        precision: dtype of weights and images, one of `effkernels.plan.launches.PRECISIONS`.
        rounds: turns of some 50 ms each, after which the median is taken.
        num_classes, in_chans: of the network, as it is going to be used.
        prepare: called with the module before it is timed, such as `effkernels.optimize_` for another library's
            network, which has no fused kernels of itself.

    Raises:
        ValueError: a precision that is not known, or a number below 1.
    """

    device: str = "cpu"
    batch_size: int = 1
    precision: str = "float32"
    rounds: int = 8
    num_classes: int = 1000
    in_chans: int = 3
    prepare: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        _check(self.precision, batch_size=self.batch_size, rounds=self.rounds)

    @property
    def is_measured(self) -> bool:
        """True."""
        return True

    @property
    def description(self) -> str:
        """Device, batch size, precision and threads."""
        if torch.device(self.device).type == "cpu":
            where = f"{environment.cpu_model()}, {torch.get_num_threads()} threads"
        else:
            where = torch.cuda.get_device_name(self.device)
        return f"measured on {where}, batch {self.batch_size}, {self.precision}"

    def __call__(self, network: Network) -> float:
        """Return the milliseconds of one forward."""
        device, dtype = torch.device(self.device), PRECISIONS[self.precision]
        module = network.build(num_classes=self.num_classes, in_chans=self.in_chans, device=device, dtype=dtype).eval()
        if self.prepare is not None:
            self.prepare(module)
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.in_chans, network.resolution, network.resolution)
        first = torch.randn(shape, generator=generator)
        count = timing.input_count(first.nbytes, environment.last_level_cache_bytes(device))
        images = [
            torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last)
            for _ in range(count)
        ]
        with torch.inference_mode():
            times = timing.time_in_turns(
                {"network": lambda index: module(images[index % count])}, device=device, rounds=self.rounds
            )
        return timing.summarise(times["network"]).median_us / 1e3


@dataclass(frozen=True)
class PlannedLatency:
    """Latency planned for a GPU that need not be here: the floors of all launches. A lower bound, not measured.

    Starting the launches is not in it, which at batch 1 can take longer than they do.

    Attributes:
        gpu: name of one of `effkernels.plan.gpus.GPUS`.
        batch_size, precision, num_classes, in_chans: as of `MeasuredLatency`.
        prepare: as of `MeasuredLatency`; the module is then built on the CPU and moved to the meta device.

    Raises:
        ValueError: an unknown GPU or precision, or a number below 1.
    """

    gpu: str = gpus.DEFAULT_GPU
    batch_size: int = 1
    precision: str = "bfloat16"
    num_classes: int = 1000
    in_chans: int = 3
    prepare: Callable[[nn.Module], object] | None = None

    def __post_init__(self) -> None:
        gpus.find(self.gpu)
        _check(self.precision, batch_size=self.batch_size)

    @property
    def is_measured(self) -> bool:
        """False."""
        return False

    @property
    def description(self) -> str:
        """GPU, batch size, precision, and that it is a lower bound."""
        title = gpus.find(self.gpu).title
        return f"planned for {title}, batch {self.batch_size}, {self.precision}: a lower bound, not measured"

    def __call__(self, network: Network) -> float:
        """Return the milliseconds that one forward takes at least."""
        gpu, dtype = gpus.find(self.gpu), PRECISIONS[self.precision]
        device = "meta" if self.prepare is None else "cpu"  # what is prepared may have to be run
        module = network.build(num_classes=self.num_classes, in_chans=self.in_chans, device=device, dtype=dtype).eval()
        if self.prepare is not None:
            self.prepare(module)
            module = module.to("meta")
        shape = (self.batch_size, self.in_chans, network.resolution, network.resolution)
        images = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        calls = record_calls(module, images)
        return sum(launch.floor_us for call in calls for launch in plan_call(call, gpu, allow_tf32=True)) / 1e3


def _check(precision: str, **numbers: int) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}; allowed: {', '.join(PRECISIONS)}")
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}; allowed: 1 or more")


@dataclass
class Remembered:
    """A latency that takes every network once: several ways of scaling often meet in one network.

    Attributes:
        latency: the source of the values.
        known: milliseconds by `identity`.
    """

    latency: Latency
    known: dict[Hashable, float] = field(default_factory=dict)

    @property
    def is_measured(self) -> bool:
        """As of the latency."""
        return self.latency.is_measured

    @property
    def description(self) -> str:
        """As of the latency."""
        return self.latency.description

    def __call__(self, network: Network) -> float:
        """Return the milliseconds of one forward."""
        key = identity(network)
        if key not in self.known:
            self.known[key] = self.latency(network)
        return self.known[key]


@dataclass(frozen=True)
class LatencyFit(Generic[N]):
    """The largest network within a latency, along one way of scaling.

    Attributes:
        network: the scaled network.
        cost: what it costs, counted.
        scaling: alpha, beta, gamma it was scaled by.
        phi: the compound coefficient.
        latency_ms: of the network.
        next_ms: of the next larger one, which is over the budget.
        latency: how it is known, `Latency.description`.
    """

    network: N
    cost: Cost
    scaling: CompoundScaling
    phi: float
    latency_ms: float
    next_ms: float
    latency: str


def fit_latency(
    network: N,
    budget_ms: float,
    *,
    latency: Latency | None = None,
    scaling: CompoundScaling | None = EFFICIENTNET,
    rounding: Rounding | None = None,
    grid: float = 0.1,
    tolerance: float = 0.02,
) -> LatencyFit[N]:
    """Scale a network as far as a latency allows, up or down: equation 2 with time as the constraint.

    Bisection between a phi that is within the budget and one that is not. Latency grows in steps, and measured ones
    scatter: a network just over the budget may be taken for one within it and the other way round, by as much as the
    scatter is.

    Args:
        network: the baseline.
        budget_ms: the most that one forward of a batch may take, in milliseconds.
        latency: `MeasuredLatency` or `PlannedLatency`; None: measured on the CPU at batch 1 in float32.
        scaling: alpha, beta, gamma; for one dimension alone `ALONE["depth"]` and so on. None: depth, width and
            resolution are free, and of all ways to double the FLOPs on a grid the one is taken that fits the most
            multiply-adds into the budget. (That is no statement about accuracy: `search` finds the most accurate one.)
        rounding: how layers, channels and pixels become whole numbers.
        grid: step of alpha, beta, gamma where they are free.
        tolerance: phi is found to this much.

    Returns:
        A network within the budget.

    Raises:
        ValueError: budget_ms or tolerance not positive, or coefficients that do not grow.
        OutOfReach: a budget below the smallest network, or one that scaling never reaches (it is a ValueError too).
    """
    if not budget_ms > 0:
        raise ValueError(f"fit_latency: budget_ms={budget_ms}; allowed: above 0")
    if not tolerance > 0:
        raise ValueError(f"fit_latency: tolerance={tolerance}; allowed: above 0")
    remembered = latency if isinstance(latency, Remembered) else Remembered(latency or MeasuredLatency())
    if scaling is None:
        ways = on_grid(2.0, grid=grid, tolerance=0.05)
        fits, reasons = [], []
        for way in ways:
            try:
                fits.append(_fit(network, budget_ms, remembered, way, rounding, tolerance))
            except OutOfReach as error:
                reasons.append(error)
        if not fits:
            raise reasons[0]
        return max(fits, key=lambda fit: fit.cost.multiply_adds)
    return _fit(network, budget_ms, remembered, scaling, rounding, tolerance)


def _fit(
    network: N,
    budget_ms: float,
    latency: Remembered,
    scaling: CompoundScaling,
    rounding: Rounding | None,
    tolerance: float,
) -> LatencyFit[N]:
    if scaling.flops(1) <= 1.0:
        raise ValueError(f"fit_latency: {scaling} does not grow; allowed: one of alpha, beta, gamma above 1")
    doubling = 1 / math.log2(scaling.flops(1))

    def at(phi: float) -> float:
        try:
            return latency(scale(network, phi, scaling=scaling, rounding=rounding))
        except TooManyLayersError as error:
            raise OutOfReach(
                f"fit_latency: {network.name} stays within {budget_ms:g} ms as far as it can be scaled ({error})"
            ) from error

    inside, outside = 0.0, 0.0
    if at(0.0) <= budget_ms:
        while at(outside) <= budget_ms:
            inside, outside = outside, outside + doubling
            if outside > _FARTHEST * doubling:
                raise OutOfReach(f"fit_latency: {network.name} stays within {budget_ms:g} ms however far it is scaled")
    else:
        while at(inside) > budget_ms:
            inside, outside = inside - doubling, inside
            if inside < -_FARTHEST * doubling:
                raise OutOfReach(
                    f"fit_latency: {network.name} takes {at(outside):.3g} ms even scaled down to phi={outside:.3g}; "
                    f"budget_ms={budget_ms:g} is out of reach"
                )
    while outside - inside > tolerance:
        middle = (inside + outside) / 2
        if at(middle) <= budget_ms:
            inside = middle
        else:
            outside = middle
    found = scale(network, inside, scaling=scaling, rounding=rounding)
    return LatencyFit(found, found.cost(), scaling, inside, at(inside), at(outside), latency.description)

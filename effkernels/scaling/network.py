"""Networks as the scaling method sees them: stages of equal layers (Tan and Le 2019, equation 1), and their scaling.

    N = stages i = 1 ... s of F_i repeated L_i times on tensors of (H_i, W_i, C_i)

Scaling multiplies all L_i by one factor, all C_i by another and the input's height and width by a third; F_i stays.
What FLOPs, parameters and memory that costs is counted on the meta device, so that no weight is ever allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from effkernels.models.compound import EFFICIENTNET, CompoundScaling, round_filters
from effkernels.scaling.counting import Cost, count

MOST_LAYERS = 4096  # of a network, in all stages; more would take hours and all memory to build, even on meta


class TooManyLayersError(ValueError):
    """A network has more than `MOST_LAYERS` layers."""


DEPTH_ROUNDINGS: tuple[str, ...] = ("up", "nearest", "down")
Builder = Callable[..., nn.Module]


@dataclass(frozen=True)
class Rounding:
    """The rounding of scaled sizes to whole numbers.

    Attributes:
        divisor: channels are multiples of it, never more than 10 % below the product (`round_filters`).
        depth: "up" as the released EfficientNets do, "nearest" or "down"; at least one layer stays.
        resolution: height and width of the input are the nearest multiple of it.

    Raises:
        ValueError: a number below 1, or an unknown word.
    """

    divisor: int = 8
    depth: str = "up"
    resolution: int = 1

    def __post_init__(self) -> None:
        for name in ("divisor", "resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"Rounding: {name}={getattr(self, name)}; allowed: 1 or more")
        if self.depth not in DEPTH_ROUNDINGS:
            raise ValueError(f"Rounding: depth={self.depth!r}; allowed: {', '.join(DEPTH_ROUNDINGS)}")

    def layers(self, product: float) -> int:
        """Layers of a stage from the unrounded product."""
        rounded = {"up": math.ceil(product - 1e-9), "nearest": math.floor(product + 0.5), "down": math.floor(product)}
        return max(1, rounded[self.depth])

    def pixels(self, product: float) -> int:
        """Height or width of the input from the unrounded product."""
        return max(1, math.floor(product / self.resolution + 0.5)) * self.resolution


@dataclass(frozen=True)
class Stage:
    """One line of equation 1: `layers` times `operator`.

    Attributes:
        operator: what is repeated, a word that the network's builder knows.
        layers: L_i.
        channels: C_i, out of every layer.
        stride: of the first layer; the others have 1.
        kernel_size: of the spatial convolution in a layer.
        options: what else the builder wants to know of a layer (expansion, squeeze-and-excitation, ...).
        deepens, widens: whether depth and width scaling change the stage; a stem or a head is never repeated.
    """

    operator: str
    layers: int
    channels: int
    stride: int = 1
    kernel_size: int = 3
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    deepens: bool = True
    widens: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "channels", "stride", "kernel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stage {self.operator}: {name}={getattr(self, name)}; allowed: 1 or more")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))  # frozen as the rest is

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickling and copying, which a read-only mapping cannot do for itself."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _restore_stage, ({**values, "options": dict(self.options)},)


def _restore_stage(values: dict[str, Any]) -> Stage:
    return Stage(**values)


@dataclass(frozen=True)
class StageRow:
    """One line of equation 1 with the tensor that enters it, as a table prints it.

    Attributes:
        operator: F_i.
        layers: L_i.
        channels: C_i, out of every layer.
        height, width: H_i and W_i, of the tensor that enters the stage.
    """

    operator: str
    layers: int
    channels: int
    height: int
    width: int


class Network(Protocol):
    """A scalable network: a `StagedNetwork`, or a `effkernels.scaling.sources.BuiltNetwork` of another library."""

    @property
    def name(self) -> str:
        """For tables and messages."""

    @property
    def resolution(self) -> int:
        """Height and width of the input, in pixels."""

    def scaled(
        self: N, *, depth: float, width: float, resolution: float, rounding: Rounding | None = None, name: str
    ) -> N:
        """Return the network with layers, channels and the input's height and width multiplied; see `scale`."""

    def build(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Return the network as a module, with weights drawn at random, in training mode."""

    def cost(self, *, num_classes: int = 1000, in_chans: int = 3) -> Cost:
        """FLOPs, parameters and memory of one image at the network's resolution, counted."""

    def rows(self) -> list[StageRow]:
        """Equation 1: the stages and the size of what enters them."""


N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class StagedNetwork:
    """A network of stages, and how to build it.

    Attributes:
        name: for tables and messages.
        resolution: height and width of its input, in pixels.
        stages: from the stem to the last convolution.
        builder: called as `builder(network, num_classes=, in_chans=, device=, dtype=)`; returns the module, from images
            (N, in_chans, resolution, resolution) to logits (N, num_classes).

    Raises:
        ValueError: more layers than `MOST_LAYERS`.
    """

    name: str = field(compare=False)  # two scalings that round to the same stages are the same network
    resolution: int
    stages: tuple[Stage, ...]
    builder: Builder

    def __post_init__(self) -> None:
        layers = sum(stage.layers for stage in self.stages)
        if layers > MOST_LAYERS:
            raise TooManyLayersError(f"{self.name}: {layers} layers; allowed: {MOST_LAYERS} in all stages")

    def build(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Return the network as a module, with weights drawn at random, in training mode."""
        return self.builder(self, num_classes=num_classes, in_chans=in_chans, device=device, dtype=dtype)

    def shapes(self) -> list[tuple[Stage, int]]:
        """Return each stage and the height (and width) of the tensor that enters it."""
        found, size = [], self.resolution
        for stage in self.stages:
            found.append((stage, size))
            size = math.ceil(size / stage.stride)
        return found

    def rows(self) -> list[StageRow]:
        """Equation 1: the stages and the size of what enters them."""
        return [StageRow(stage.operator, stage.layers, stage.channels, size, size) for stage, size in self.shapes()]

    def scaled(
        self, *, depth: float, width: float, resolution: float, rounding: Rounding | None = None, name: str
    ) -> StagedNetwork:
        """Return the network with its layers, channels and input multiplied and rounded; `scale` has the arguments."""
        rounding = rounding or Rounding()
        stages = tuple(
            replace(
                stage,
                layers=rounding.layers(stage.layers * depth) if stage.deepens else stage.layers,
                channels=_channels(stage.channels, width, rounding.divisor) if stage.widens else stage.channels,
            )
            for stage in self.stages
        )
        return replace(self, name=name, resolution=rounding.pixels(self.resolution * resolution), stages=stages)

    def cost(self, *, num_classes: int = 1000, in_chans: int = 3) -> Cost:
        """FLOPs, parameters and memory of one image at the network's resolution, counted, nothing is allocated."""
        return _cost(self, num_classes, in_chans)


def scale(
    network: N,
    phi: float | None = None,
    *,
    scaling: CompoundScaling = EFFICIENTNET,
    depth: float = 1.0,
    width: float = 1.0,
    resolution: float = 1.0,
    rounding: Rounding | None = None,
    name: str | None = None,
) -> N:
    """Scale a network by one coefficient in all dimensions (equation 3), or by a factor in each.

    Args:
        network: the baseline: a `StagedNetwork`, or another library's (`effkernels.scaling.sources`).
        phi: the compound coefficient; depth, width and resolution then come from `scaling` and must be left at 1.
        scaling: alpha, beta, gamma; by default those that the paper found for EfficientNet.
        depth, width, resolution: factors on layers, channels and the input's height and width.
        rounding: how the results become whole numbers; by default as the released EfficientNets.
        name: of the result; by default the baseline's with what was done to it.

    Raises:
        ValueError: a factor that is not positive and finite, phi together with a factor, or a dimension that the
            network's library cannot scale.
    """
    if phi is not None:
        if (depth, width, resolution) != (1.0, 1.0, 1.0):
            raise ValueError(f"scale: phi={phi} with depth={depth}, width={width}, resolution={resolution}; allowed: "
                             "phi alone, or factors alone")  # fmt: skip
        if not math.isfinite(phi):
            raise ValueError(f"scale: phi={phi}; allowed: finite")
        depth, width, resolution = scaling.depth(phi), scaling.width(phi), scaling.resolution(phi)
    for word, factor in (("depth", depth), ("width", width), ("resolution", resolution)):
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"scale: {word}={factor}; allowed: finite and above 0")
    if name is None:
        done = [f"{letter}={factor:.4g}" for letter, factor in zip("dwr", (depth, width, resolution), strict=True)]
        name = f"{network.name} ({', '.join(word for word in done if not word.endswith('=1')) or 'unscaled'})"
    return network.scaled(depth=depth, width=width, resolution=resolution, rounding=rounding, name=name)


def _channels(channels: int, width: float, divisor: int) -> int:
    """Scaled channels; those of a width of 1 stay, whatever the divisor."""
    return channels if width == 1.0 else round_filters(channels, width, divisor)


@cache
def _cost(network: StagedNetwork, num_classes: int, in_chans: int) -> Cost:
    module = network.build(num_classes=num_classes, in_chans=in_chans, device="meta")
    return count(module, (in_chans, network.resolution, network.resolution))

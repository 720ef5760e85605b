"""Find the feature maps of each resolution in a network, and select those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict, overload

from effkernels.models.architecture import Architecture


class Feature(TypedDict):
    """One feature map: the last one of its resolution before the network halves it again.

    stage: the number of the stage that computes it, counted from 1; reduction: input pixels per pixel, along each
    axis; module: name of the stage's module; num_chs: channels; index: position among all feature maps of the network.
    """

    stage: int
    reduction: int
    module: str
    num_chs: int
    index: int


class FeatureInfo(Sequence[Feature]):
    """The feature maps that a network offers or, in a features_only model, returns, in their order.

    A sequence of dicts with timm's keys; `channels()`, `reduction()` and `module_name()` give one entry each.
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self._features = tuple(features)

    @classmethod
    def of(cls, architecture: Architecture) -> FeatureInfo:
        """Return every feature map of a network: the ends of stages after which the resolution halves, and the last."""
        features: list[Feature] = []
        reduction = 2
        for position, stage in enumerate(architecture.stages):
            reduction *= stage.stride
            following = architecture.stages[position + 1 : position + 2]
            if not following or following[0].stride > 1:
                features.append(
                    Feature(
                        stage=position + 1,
                        reduction=reduction,
                        module=f"blocks.{position}",
                        num_chs=stage.channels,
                        index=len(features),
                    )
                )
        return cls(features)

    def select(self, out_indices: Sequence[int] | None) -> FeatureInfo:
        """Return the maps at `out_indices` (negative ones count from the end; None: all), from high to low resolution.

        Raises:
            ValueError: no index, or one out of range.
        """
        if out_indices is None:
            return self
        count = len(self._features)
        wrong = [i for i in out_indices if not -count <= i < count]
        if wrong or not out_indices:
            raise ValueError(
                f"out_indices={tuple(out_indices)} must name at least one of the {count} feature maps, "
                f"as {-count} to {count - 1}"
            )
        return FeatureInfo([self._features[i] for i in sorted({i % count for i in out_indices})])

    def channels(self) -> list[int]:
        """Return the channels of each map."""
        return [feature["num_chs"] for feature in self]

    def reduction(self) -> list[int]:
        """Input pixels per pixel of each map, along each axis."""
        return [feature["reduction"] for feature in self]

    def module_name(self) -> list[str]:
        """Return the name of the module that computes each map."""
        return [feature["module"] for feature in self]

    @overload
    def __getitem__(self, index: int) -> Feature: ...

    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...

    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        return list(self._features[index]) if isinstance(index, slice) else self._features[index]

    def __len__(self) -> int:
        return len(self._features)

    def __iter__(self) -> Iterator[Feature]:
        return iter(self._features)

    def __repr__(self) -> str:
        return f"FeatureInfo({list(self._features)})"

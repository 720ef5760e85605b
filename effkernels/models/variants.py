"""The published variants: B0 to B7 of the paper and Lite0 to Lite4, and which of them a state_dict is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from effkernels.models.architecture import BASELINE, LITE_BASELINE, Architecture
from effkernels.models.compound import PUBLISHED, PUBLISHED_LITE, ScalingCoefficients
from effkernels.models.layouts import Layout, Part, tensor_shapes

Shapes = dict[tuple[Part, str], tuple[int, ...]]
"""The type of what `effkernels.models.layouts.tensor_shapes` returns."""


@dataclass(frozen=True)
class Variant:
    """A network that weights are published for.

    Attributes:
        name: "b0" to "b7", "lite0" to "lite4".
        coefficients: that scale its baseline; `coefficients.resolution` is the size it was designed for.
        architecture: the scaled network.
    """

    name: str
    coefficients: ScalingCoefficients
    architecture: Architecture

    @property
    def is_lite(self) -> bool:
        """Return whether it has ReLU6 and no squeeze-and-excitation."""
        return is_lite(self.name)


def is_lite(variant: str) -> bool:
    """Return whether a name such as "b0" or "lite0" is that of a lite variant."""
    return variant.startswith("lite")


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {name: Variant(name, own, BASELINE.scaled(own)) for name, own in PUBLISHED.items()}
    | {name: Variant(name, own, LITE_BASELINE.scaled(own, fix_stem_head=True)) for name, own in PUBLISHED_LITE.items()}
)
"""Variants by name."""


@dataclass(frozen=True)
class Match:
    """The similarity of a state_dict to a variant.

    Attributes:
        variant: its name.
        shared: number of tensors whose names and shapes are the variant's.
        fit: that number as a share of all names that either of the two has.
    """

    variant: str
    shared: int
    fit: float


def matches(tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Match]:
    """Return each variant that a library has, with how near the tensors are to it.

    Args:
        tensors: key -> tensor, under the library's usual names.
        layout: the library.
    """
    in_chans, num_classes = ends(tensors, layout)
    found = {}
    for name, variant in VARIANTS.items():
        if variant.is_lite and not layout.lite:
            continue
        shapes = tensor_shapes(variant.architecture, in_chans=in_chans, num_classes=num_classes)
        keys = tensor_keys(layout, name, shapes)
        shared = sum(
            keys[entry] in tensors and fits(tensors[keys[entry]], entry[0], shape) for entry, shape in shapes.items()
        )
        found[name] = Match(name, shared, shared / len(tensors.keys() | set(keys.values())))
    return found


def ends(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[int, int]:
    """Return the numbers of input channels and of classes, as the first and the last tensor have them."""
    stem = tensors.get(f"{layout.outside['stem']}.weight")
    in_chans = stem.shape[1] if stem is not None and stem.ndim == 4 else 3
    classifier = [tensors.get(f"{layout.outside['classifier']}.{name}") for name in ("weight", "bias")]
    return in_chans, next((tensor.shape[0] for tensor in classifier if tensor is not None and tensor.ndim), 0)


def tensor_keys(layout: Layout, variant: str, shapes: Shapes) -> dict[tuple[Part, str], str]:
    """Return the library's key of every tensor."""
    names = layout.module_names(VARIANTS[variant].architecture)
    return {(part, name): f"{names[part]}.{name}" for part, name in shapes}


def fits(tensor: Tensor, part: Part, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has the shape that the part needs."""
    # Squeeze-and-excitation may be linear layers in any library's file: the same numbers.
    linear = part.role in ("squeeze", "excite") and tuple(tensor.shape) == shape[:2]
    return tuple(tensor.shape) == shape or linear

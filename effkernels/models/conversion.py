"""State_dicts from one library's names to another's, with what the weights mean on either side.

Renaming is the easy half: every library has the same tensors (see `effkernels.models.layouts`). The other half is that
equal tensors mean different functions: padding and eps are nowhere in a state_dict. A conversion therefore comes with
its `Semantics`: what the weights need, the code that builds the target's model so, and what the target cannot do.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from effkernels.models.checkpoint_files import network_tensors
from effkernels.models.checkpoint_tensors import (
    CheckpointError,
    check_dtypes,
    check_structure,
    check_values,
    enumerated,
)
from effkernels.models.checkpoints import recognise_tensors
from effkernels.models.layouts import LAYOUTS, TIMM, Layout, Semantics, starts_network, tensor_shapes
from effkernels.models.recipes import recipe
from effkernels.models.variants import VARIANTS, Shapes, ends, fits, matches, tensor_keys

LIBRARIES: tuple[str, ...] = tuple(layout.name for layout in LAYOUTS)
"""Names that `convert_state_dict` takes for `src` and `dst`."""

_VARIANT = re.compile(r"(?P<tf>tf_)?(?:(?P<family>efficientnet)[-_])?(?P<variant>b[0-7]|lite[0-4])")
# Below this share of tensors that fit the nearest variant, its list of differences would not help anybody.
_LEAST_FIT = 0.5


@dataclass(frozen=True)
class Conversion:
    """A state_dict under another library's names.

    Attributes:
        source, target: the two libraries.
        tensors: under the target's names.
        semantics: what the weights mean.
        in_chans: channels of an image.
        num_classes: of the classifier; 0: none.
    """

    source: Layout
    target: Layout
    tensors: dict[str, Tensor]
    semantics: Semantics
    in_chans: int
    num_classes: int


def convert_state_dict(
    state_dict: Mapping[str, Tensor], src: str | None, dst: str, *, variant: str | None = None
) -> tuple[dict[str, Tensor], Semantics]:
    """Bring the weights of an EfficientNet from one library's names and shapes to another's.

    Known are "timm", "torchvision", "lukemelas" (EfficientNet-PyTorch), "huggingface" (transformers) and "nvidia"
    (DeepLearningExamples), B0 to B7, with any number of classes and of image channels, with or without classifier;
    timm and lukemelas (its fork efficientnet_lite_pytorch) also have Lite0 to Lite4. What a wrapper puts in front of
    every key ("module.", "model.", ...) is taken off, the names of NVIDIA's NGC files ("layer1.") and of Hugging Face's
    `EfficientNetModel` (no "efficientnet.") are understood. For a checkpoint file see
    `effkernels.models.read_checkpoint`, whose `tensors` can be given here.

    Args:
        state_dict: key -> tensor, on any device and in any dtype; on the meta device only the values go unchecked.
        src: the library it comes from; None: recognised by the keys.
        dst: the library it shall go to.
        variant: "b0", "efficientnet_b0" or "tf_efficientnet_b0" (or "lite0", ...); None: recognised by the shapes,
            against which a given one is checked. For weights of timm give the model's full name: the keys and shapes of
            `efficientnet_*` and `tf_efficientnet_*` are the same, their padding and eps are not.

    Returns:
        (state_dict, semantics). The new dict has the target's order of keys and holds the very tensors of the old one,
        or views of them where squeeze-and-excitation goes from 1x1 convolutions to linear layers (NVIDIA's default) or
        back: nothing is copied, so clone before you change one in place. Going back gives the first tensors again, bit
        by bit, under the library's usual names. `num_batches_tracked` is kept where there is one. Without a classifier
        Hugging Face's names are those of `EfficientNetModel`. The semantics say what the weights need (`pad_type`,
        `bn_eps`, `bn_momentum`), the code that builds the target's model accordingly (`build`) and what that cannot
        give (`warnings`).

    Raises:
        ValueError: src, dst or variant unknown, or in contradiction to the tensors; dst without the lite variants.
        CheckpointError: (a ValueError) keys missing or unexpected, tensors that are sparse, quantised or expanded, or
            hold no floating numbers, shapes of no variant, values that are not finite, negative variances.
        TypeError: state_dict is no mapping of strings to tensors.
    """
    conversion = convert(state_dict, src, dst, variant=variant)
    return conversion.tensors, conversion.semantics


def convert(state_dict: Mapping[str, Tensor], src: str | None, dst: str, *, variant: str | None = None) -> Conversion:
    """Do `convert_state_dict`, and return everything that was found out on the way."""
    target = _layout("dst", dst)
    wanted = None if src is None else _layout("src", src)
    asked = _parse(variant)
    _check_types(state_dict)
    source, tensors = _under_usual_names(state_dict, wanted)
    where = f"state_dict ({source.name} keys)"
    for key, tensor in tensors.items():
        check_structure(key, tensor, where)
    check_dtypes(tensors, where)
    in_chans, num_classes = ends(tensors, source)
    found = _find_variant(tensors, source, asked)
    if VARIANTS[found].is_lite and not target.lite:
        able = " and ".join(layout.name for layout in LAYOUTS if layout.lite)
        raise ValueError(f"dst={dst!r} has no EfficientNet-Lite, and the tensors are those of {found}; {able} have it")
    shapes = tensor_shapes(VARIANTS[found].architecture, in_chans=in_chans, num_classes=num_classes)
    _check_tensors(tensors, source, found, shapes)
    check_values(tensors, where)
    semantics = _meaning(source, found, variant)
    return Conversion(
        source,
        target,
        _renamed(tensors, source, target, found, shapes, headless=num_classes == 0),
        _with_recipe(semantics, source, target, in_chans, num_classes),
        in_chans,
        num_classes,
    )


def _layout(argument: str, name: str) -> Layout:
    found = next((layout for layout in LAYOUTS if layout.name == name), None)
    if found is None:
        allowed = ", ".join(map(repr, LIBRARIES)) + (", None" if argument == "src" else "")
        raise ValueError(f"{argument}={name!r} is not a known library; allowed: {allowed}")
    return found


def _parse(variant: str | None) -> str | None:
    if variant is None:
        return None
    match = _VARIANT.fullmatch(variant)
    if match is None:
        raise ValueError(
            f"variant={variant!r} is not known; allowed: b0 to b7 and lite0 to lite4, each also with efficientnet_ or "
            "tf_efficientnet_ in front"
        )
    return match["variant"]


def _check_types(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; a dict of tensors is needed")
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise TypeError(f"state_dict: the key {key!r} is a {type(key).__name__}; a string is needed")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state_dict[{key!r}] is a {type(value).__name__}; tensors are needed. "
                "Whole training checkpoints are opened by effkernels.models.read_checkpoint(FILE).tensors"
            )


def _under_usual_names(state_dict: Mapping[str, Tensor], wanted: Layout | None) -> tuple[Layout, dict[str, Tensor]]:
    """Return the library, and the tensors under its usual names."""
    if not state_dict:
        raise CheckpointError("state_dict is empty")
    network = network_tensors(state_dict, "state_dict", starts_network)
    bare = network.tensors
    if (left_out := network.note()) is not None:
        warnings.warn(f"state_dict: {left_out}", stacklevel=4)
    try:
        layout, tensors = recognise_tensors(bare, "state_dict")
    except CheckpointError:
        if wanted is None:
            raise
        # Its first key is missing: the list of all missing keys says more than that.
        layout, tensors = wanted, {wanted.rename(key): tensor for key, tensor in bare.items()}
    if wanted is not None and layout is not wanted:
        raise ValueError(f"src={wanted.name!r}, but the keys are those of {layout.name} ({layout.marker})")
    if len(tensors) != len(bare):
        usual = Counter(layout.rename(key) for key in bare)
        twice = [key for key in bare if usual[layout.rename(key)] > 1]
        raise CheckpointError(f"state_dict ({layout.name} keys) has two spellings of one part: {enumerated(twice)}")
    return layout, tensors


def _find_variant(tensors: Mapping[str, Tensor], layout: Layout, asked: str | None) -> str:
    """Return the variant that most tensors fit, which has to be the one asked for."""
    found = matches(tensors, layout)
    nearest = max(found.values(), key=lambda match: match.fit)
    if nearest.fit < _LEAST_FIT:
        known = "B0 to B7 and Lite0 to Lite4" if layout.lite else "B0 to B7"
        raise CheckpointError(
            f"state_dict ({layout.name} keys) is none of EfficientNet {known}: the nearest is {nearest.variant}, with "
            f"names and shapes of {nearest.shared} of the {len(tensors)} tensors"
        )
    if asked is not None and (asked not in found or found[asked].fit < nearest.fit):
        raise ValueError(f"variant is {asked}, but the tensors are those of {nearest.variant} ({layout.name} keys)")
    return nearest.variant


def _check_tensors(tensors: Mapping[str, Tensor], layout: Layout, variant: str, shapes: Shapes) -> None:
    """Refuse what is not exactly the tensors of a variant; only counts of batches may be missing."""
    keys = tensor_keys(layout, variant, shapes)
    missing = [key for (_, name), key in keys.items() if key not in tensors and name != "num_batches_tracked"]
    usual = set(keys.values())
    unexpected = [key for key in tensors if key not in usual]
    misshaped = {
        key: f"{key} is {tuple(tensors[key].shape)}, not {shapes[part, name]}"
        for (part, name), key in keys.items()
        if key in tensors and not fits(tensors[key], part, shapes[part, name])
    }
    problems = [
        f"{title} ({len(entries)}): {enumerated(entries)}"
        for title, entries in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", list(misshaped.values())),
        )
        if entries
    ]
    if not problems:
        return
    gates = {key for (part, _), key in keys.items() if part.role in ("squeeze", "excite")}
    if misshaped and misshaped.keys() <= gates and not missing and not unexpected:
        problems.append(
            "squeeze-and-excitation has another width, as in NVIDIA's widese models, which no other library can hold"
        )
    raise CheckpointError("\n  ".join([f"state_dict ({layout.name} keys) is not that of a {variant}", *problems]))


def _meaning(source: Layout, variant: str, given: str | None) -> Semantics:
    """Return what the source's weights need; for timm's only where the model's full name was given."""
    match = None if given is None else _VARIANT.fullmatch(given)
    tensorflow, named = (False, False) if match is None else (match["tf"] is not None, match["family"] is not None)
    if source is not TIMM and tensorflow:
        raise ValueError(
            f"variant={given!r} says how timm's weights were trained, but these are {source.name}'s; allowed here: "
            f"{variant}, efficientnet_{variant}, None"
        )
    semantics = source.semantics(variant)
    if source is TIMM and tensorflow:
        semantics = Semantics("same", 1e-3, 0.1)
    elif source is TIMM and named:
        semantics = Semantics("", 1e-5, 0.1)
    return replace(semantics, variant=variant, native_size=VARIANTS[variant].coefficients.resolution)


def _with_recipe(semantics: Semantics, source: Layout, target: Layout, in_chans: int, num_classes: int) -> Semantics:
    if semantics.pad_type is None:
        name = f"efficientnet_{semantics.variant}"
        return replace(
            semantics,
            warnings=(
                f"the keys of {source.name} do not distinguish {name} (symmetric padding, eps 1e-05) from tf_{name} "
                f"(SAME padding, eps 0.001): give one of them as the variant to learn how to build the model of "
                f"{target.name}; in the wrong one the weights lose their meaning",
            ),
        )
    made = recipe(target, semantics, in_chans=in_chans, num_classes=num_classes)
    return replace(semantics, build=made.code, warnings=made.warnings)


def _renamed(
    tensors: Mapping[str, Tensor], source: Layout, target: Layout, variant: str, shapes: Shapes, *, headless: bool
) -> dict[str, Tensor]:
    """Return the tensors under the target's names, in its order and its shapes."""
    old, new = tensor_keys(source, variant, shapes), tensor_keys(target, variant, shapes)
    renamed: dict[str, Tensor] = {}
    for (part, name), shape in shapes.items():
        tensor = tensors.get(old[part, name])
        if tensor is None:
            continue  # a count of batches, which files of before PyTorch 0.4.1 do not have
        if part.role in ("squeeze", "excite") and name == "weight":
            tensor = tensor.reshape(shape[:2] if target.linear_squeeze_excite else shape)
        key = new[part, name]
        renamed[target.headless(key) if headless else key] = tensor
    return renamed

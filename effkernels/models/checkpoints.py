"""Checkpoints of EfficientNets: recognised by their keys, loaded with their meaning.

The keys identify the library (timm, torchvision, lukemelas, Hugging Face, NVIDIA). The library implies padding, eps and
momentum of the norms, which are then set in the model (see `effkernels.models.layouts`).
`effkernels.models.checkpoint_files` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from effkernels.files import parse_json, printable
from effkernels.models.checkpoint_files import read_file
from effkernels.models.checkpoint_tensors import CheckpointError, check_dtypes, check_range, enumerated, file_of
from effkernels.models.layouts import LAYOUTS, TIMM, Layout, Semantics, recognise, starts_network, translation
from effkernels.models.variants import VARIANTS, ends, is_lite, matches
from effkernels.nn import PAD_TYPES

if TYPE_CHECKING:
    from effkernels.models.efficientnet import EfficientNet, EfficientNetFeatures

Model = TypeVar("Model", bound="EfficientNet | EfficientNetFeatures")
_LARGEST_SIZE = 16384  # pixels, of an image that a network may be noted to be designed for


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under the names of the library that wrote it.

    Attributes:
        path: of the file.
        layout: the library's names and semantics.
        tensors: key -> tensor, on the CPU.
        noted: what the file itself says about its weights, as `effkernels export` and `effkernels convert` note it in a
            safetensors file; it counts more than the layout's.
    """

    path: Path
    layout: Layout
    tensors: Mapping[str, Tensor]
    noted: Semantics = field(default_factory=Semantics)

    def tensor(self, role: str, name: str = "weight") -> Tensor | None:
        """Return a tensor outside the blocks ("stem", "head", "classifier"), or None if the file has none."""
        return self.tensors.get(f"{self.layout.outside[role]}.{name}")


def read_checkpoint(file: str | Path, *, use_ema: bool = True) -> Checkpoint:
    """Read a .pth or .safetensors file and recognise the library that wrote it.

    The wrappers of training scripts ("state_dict", "model", ...) are opened. What precedes every key of the
    network is taken off, whatever it is: "module." of DataParallel and AveragedModel, "model." of Lightning,
    "backbone.", "_orig_mod." of torch.compile, several of them. Tensors that are not under it are left out with a
    warning that names them. Files of timm's own saver are read with what they keep beside the weights
    (argparse.Namespace, NumPy's numbers); other pickled objects are not.

    Args:
        file: path of the file.
        use_ema: prefer averaged weights where the file has both.

    Raises:
        FileNotFoundError: (an OSError) no such file.
        CheckpointError: empty, not a checkpoint, one with pickled code in it, of an unknown library, one of several
            networks; tensors that are sparse, quantised or expanded, or hold no floating numbers; values that are not
            finite, negative variances; notes that this project does not write. It has the `file` and, where it is
            about one, the `key` of the tensor.
    """
    path = Path(file)
    found = read_file(path, starts_network, use_ema=use_ema)
    layout, tensors = recognise_tensors(found.tensors, path)
    check_dtypes(tensors, path)
    return Checkpoint(path, layout, tensors, _noted_semantics(found.metadata, path))


def recognise_tensors(tensors: Mapping[str, Tensor], where: str | Path) -> tuple[Layout, dict[str, Tensor]]:
    """Return the library whose names the tensors have, and the tensors under its usual spelling of them.

    Args:
        tensors: key -> tensor, without prefixes.
        where: they come from, for the message.

    Raises:
        CheckpointError: the names are of no known library.
    """
    for layout in LAYOUTS:
        renamed = {layout.rename(key): tensor for key, tensor in tensors.items()}
        if recognise(renamed) is layout:
            return layout, renamed
    raise CheckpointError(
        f"{printable(where)}: keys such as {enumerated(sorted(tensors)[:3])} are of no known EfficientNet; known are "
        f"those of {', '.join(layout.name for layout in LAYOUTS)}",
        file=file_of(where),
    )


def build_for(checkpoint: Checkpoint, build: Callable[..., Model]) -> Model:
    """Return the model that a checkpoint fits, with the file's number of classes and of image channels, not yet loaded.

    Args:
        checkpoint: as read.
        build: called with in_chans, num_classes and device.

    Raises:
        CheckpointError: keys or shapes that are not the model's; nothing was allocated for it then.
    """
    in_chans, num_classes = ends(checkpoint.tensors, checkpoint.layout)
    try:
        outline = build(in_chans=in_chans, num_classes=num_classes, device="meta")
    except (ValueError, RuntimeError) as error:  # none at all, or more than can be counted
        raise CheckpointError(
            f"{printable(checkpoint.path)}: no network has {in_chans} image channels and {num_classes} classes",
            file=checkpoint.path,
        ) from error
    _fitting(outline, checkpoint, outline.state_dict())
    return build(in_chans=in_chans, num_classes=num_classes, device=None)


def load_read(
    model: Model,
    checkpoint: Checkpoint,
    *,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
) -> Model:
    """Load a checkpoint that has been read into a model, as `load_checkpoint` does."""
    check_semantics(Semantics(pad_type, bn_eps, bn_momentum), "load_checkpoint")
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError(
            f"{printable(checkpoint.path)}: the model is on the meta device and can hold no weights; create it on "
            "another",
            file=checkpoint.path,
        )
    tensors = _fitting(model, checkpoint, state)
    check_range(tensors, state, checkpoint.path)
    model.load_state_dict(tensors)
    variant = _variant(model) or ""
    meaning = checkpoint.layout.semantics(variant)
    known = (Semantics(pad_type, bn_eps, bn_momentum), checkpoint.noted, meaning)
    model.set_norm(
        eps=next((one.bn_eps for one in known if one.bn_eps is not None), None),
        momentum=next((one.bn_momentum for one in known if one.bn_momentum is not None), None),
    )
    pad_type = next((one.pad_type for one in known if one.pad_type is not None), None)
    if pad_type is not None:
        set_native_padding(model, pad_type, next((one.native_size for one in known if one.native_size), None))
    normalization = checkpoint.layout.normalization(variant)
    if normalization is not None and model.config is not None:
        mean, std = normalization
        model.config = replace(model.config, mean=(mean, mean, mean), std=(std, std, std))
    return model


def set_native_padding(
    model: EfficientNet | EfficientNetFeatures, pad_type: str, native_size: int | None = None
) -> None:
    """Call `model.set_padding(pad_type)`; padding that is frozen at a size is frozen at `native_size`.

    The model's config then says so too: its input has that size and the crop that goes with it.

    Args:
        model: changed in place.
        pad_type: one of `effkernels.nn.PAD_TYPES`.
        native_size: height and width of the images, in pixels; None: the config's.
    """
    config = model.config
    if pad_type == "same_native" and config is not None and native_size is not None:
        size = (config.input_size[0], native_size, native_size)
        if size != config.input_size:
            # The central crop of the published models takes 32 pixels off the resized image.
            model.config = replace(config, input_size=size, crop_pct=round(native_size / (native_size + 32), 3))
    model.set_padding(pad_type)


def _variant(model: EfficientNet | EfficientNetFeatures) -> str | None:
    """Return the published variant that a model is by its name."""
    name = model.config.name.rpartition("_")[2] if model.config is not None else ""
    return name if name in VARIANTS else None


def _fitting(
    model: EfficientNet | EfficientNetFeatures, checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the checkpoint under the model's names; CheckpointError where keys or shapes are not the model's."""
    tensors = _to_model_names(model, checkpoint, state)
    _check_fit(model, checkpoint, state, tensors)
    return tensors


def _to_model_names(
    model: EfficientNet | EfficientNetFeatures, checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the checkpoint under the model's names; keys that no part of the network has keep the library's name."""
    names = translation(checkpoint.layout, TIMM, model.architecture)
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        module, _, leaf = key.rpartition(".")
        translated = f"{names[module]}.{leaf}" if module in names else key
        if translated not in state and translated.partition(".")[0] in ("conv_head", "bn2", "classifier"):
            continue  # a backbone has no head, a model without classes no classifier
        expected = state.get(translated)
        if expected is not None and expected.ndim == 4 and expected.shape == (*tensor.shape, 1, 1):
            tensor = tensor.reshape(expected.shape)  # squeeze-and-excitation as linear layers: the same numbers
        tensors[translated] = tensor
    for key, value in state.items():
        # Files of before PyTorch 0.4.1 do not count batches, and only a momentum of None reads the count.
        if key.endswith(".num_batches_tracked"):
            tensors.setdefault(key, value)
    return tensors


def _check_fit(
    model: EfficientNet | EfficientNetFeatures,
    checkpoint: Checkpoint,
    state: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    missing = [key for key in state if key not in tensors]
    unexpected = [key for key in tensors if key not in state]
    misshaped = [
        f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in state.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems = [
        f"{title} ({len(entries)}): {enumerated(entries)}"
        for title, entries in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if entries
    ]
    if not problems:
        return
    hints = []
    other = _other_variant(model, checkpoint)
    if other is not None and model.config is not None:
        name = f"{'tf_' if model.config.name.startswith('tf_') else ''}efficientnet_{other}"
        if is_lite(other) != is_lite(_variant(model) or ""):
            raise CheckpointError(
                f"{printable(checkpoint.path)} ({checkpoint.layout.name} keys) holds the weights of {name}, which has "
                f"{'no ' if is_lite(other) else ''}squeeze-and-excitation, and the model is {model.config.name}: "
                f"create_model({name!r}) takes them",
                file=checkpoint.path,
            )
        hints.append(f"the names and shapes in the file are nearest to {name}, and the model is {model.config.name}")
    only_classes = all(entry.startswith("classifier.") for entry in misshaped) and not missing and not unexpected
    if only_classes and tensors["classifier.weight"].ndim == 2:
        classes = tensors["classifier.weight"].shape[0]
        hints.append(f"create the model with num_classes={classes}; reset_classifier() changes it afterwards")
    raise CheckpointError(
        "\n  ".join(
            [f"{printable(checkpoint.path)} ({checkpoint.layout.name} keys) does not fit the model", *problems, *hints]
        ),
        file=checkpoint.path,
        key=(missing or unexpected or [misshaped[0].partition(" ")[0]])[0],
    )


def _other_variant(model: EfficientNet | EfficientNetFeatures, checkpoint: Checkpoint) -> str | None:
    """Return the published variant that a checkpoint is nearer to than to that of the model."""
    own = _variant(model)
    if own is None:
        return None
    found = matches(checkpoint.tensors, checkpoint.layout)
    nearest = max(found.values(), key=lambda match: match.fit)
    if nearest.fit < 0.5 or (own in found and found[own].fit >= nearest.fit):
        return None
    return nearest.variant


def _noted_semantics(metadata: Mapping[str, str], path: Path) -> Semantics:
    """Return what this project stored in the metadata of a safetensors file; nothing for files of others."""
    text = metadata.get("effkernels")
    if text is None:
        return Semantics()
    where = f"{printable(path)}: its metadata under 'effkernels' is not what this project writes"
    advice = "remove the note, or convert the original again"
    try:
        note = parse_json(text)
        if not isinstance(note, dict):
            raise ValueError(f"{type(note).__name__}; needed: an object")
        noted = Semantics(
            note.get("pad_type"), note.get("bn_eps"), note.get("bn_momentum"), native_size=note.get("native_size")
        )
        check_semantics(noted, "noted")
    except ValueError as error:
        raise CheckpointError(f"{where} ({printable(error)}); {advice}", file=path) from error
    return noted


def check_semantics(semantics: Semantics, where: str) -> None:
    """Refuse what no network was trained with; None stays what is not known.

    Args:
        semantics: from a file or a caller, so that the values may be anything.
        where: they come from, for the message.

    Raises:
        ValueError: pad_type unknown; bn_eps not in (0, 1]; bn_momentum not in [0, 1]; native_size not in 1 to 16384.
    """

    def number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    pad_type, eps, momentum, size = (
        semantics.pad_type, semantics.bn_eps, semantics.bn_momentum, semantics.native_size
    )  # fmt: skip
    rules = (
        ("pad_type", pad_type, isinstance(pad_type, str) and pad_type in PAD_TYPES, ", ".join(map(repr, PAD_TYPES))),
        ("bn_eps", eps, number(eps) and 0 < eps <= 1, "above 0, at most 1"),  # type: ignore[operator]
        ("bn_momentum", momentum, number(momentum) and 0 <= momentum <= 1, "0 to 1"),  # type: ignore[operator]
        ("native_size", size, type(size) is int and 1 <= size <= _LARGEST_SIZE, f"1 to {_LARGEST_SIZE} pixels"),
    )
    for name, value, is_allowed, allowed in rules:
        if value is not None and not is_allowed:
            raise ValueError(f"{where}: {name}={str(value)[:80]!r}; allowed: {allowed}")

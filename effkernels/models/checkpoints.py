"""Checkpoint files: read without running anything in them, recognised by their keys, loaded with their meaning.

A .pth file is read by `torch.load(weights_only=True)`, a .safetensors file by safetensors; neither runs pickled code.
The keys tell the library (timm, torchvision, lukemelas, Hugging Face, NVIDIA), and the library tells padding, eps and
momentum of the norms, which are then set in the model (see `effkernels.models.layouts`).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkernels.models.layouts import LAYOUTS, TIMM, Layout, Semantics, recognise, translation

if TYPE_CHECKING:
    from effkernels.models.efficientnet import EfficientNet, EfficientNetFeatures

# Where training scripts put the weights inside a file, the averaged ones first.
_EMA_WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# What DataParallel and torch.compile put in front of every key.
_PREFIXES = ("module.", "_orig_mod.")
_LISTED = 8


class CheckpointError(ValueError):
    """A file that is not a checkpoint, or not one of this model; the message says what differs."""


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
        """A tensor outside the blocks ("stem", "head", "classifier"), or None where the file has none."""
        return self.tensors.get(f"{self.layout.outside[role]}.{name}")


def read_checkpoint(file: str | Path, *, use_ema: bool = True) -> Checkpoint:
    """Read a .pth or .safetensors file and recognise the library that wrote it.

    Wrappers of training scripts ("state_dict", "model", ...) are opened and the prefixes of DataParallel and
    torch.compile taken off.

    Args:
        file: path of the file.
        use_ema: prefer averaged weights where the file has both.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: empty, not a checkpoint, one with pickled code in it, of an unknown library, or one with
            values that are not finite.
    """
    path = Path(file)
    layout, tensors = recognise_tensors(read_tensors(path, use_ema=use_ema), str(path))
    return Checkpoint(path, layout, tensors, _noted_semantics(path) if path.suffix == ".safetensors" else Semantics())


def read_tensors(file: str | Path, *, use_ema: bool = True) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file of any network, under the names that stand in it.

    Wrappers and prefixes are taken off as by `read_checkpoint`, which also has the arguments.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: empty, not a checkpoint, one with pickled code in it, or one with values that are not finite.
    """
    path = Path(file)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a .pth or .safetensors file is needed")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _unwrap(path, content, use_ema)
    check_finite(tensors, str(path))
    return tensors


def recognise_tensors(tensors: Mapping[str, Tensor], where: str) -> tuple[Layout, dict[str, Tensor]]:
    """The library whose names the tensors have, and the tensors under its usual spelling of them.

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
        f"{where}: keys such as {', '.join(sorted(tensors)[:3])} are of no known EfficientNet; known are those of "
        f"{', '.join(layout.name for layout in LAYOUTS)}"
    )


def without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what DataParallel and torch.compile put in front of every key."""
    tensors = dict(tensors)
    while tensors and (prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None)):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def load_checkpoint(
    model: EfficientNet | EfficientNetFeatures | str,
    file: str | Path,
    *,
    use_ema: bool = True,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
) -> EfficientNet | EfficientNetFeatures:
    """Load a checkpoint of timm, torchvision, lukemelas, Hugging Face or NVIDIA into a model.

    Padding, eps and momentum of the model are set to what the file's library uses, so that the logits are that
    library's: torchvision and NVIDIA pad symmetrically; lukemelas and Hugging Face pad SAME as it is at the native
    size, whatever the size of the image (pad_type="same" for lukemelas models built with image_size=None). timm's
    keys do not tell `tf_efficientnet_*` from `efficientnet_*`: there the model stays as its name says. A safetensors
    file of `effkernels export` or `effkernels convert` notes what its weights mean, and that is what is set.

    Args:
        model: a model, changed in place, or a name for `create_model`, then built with the file's number of classes
            and of image channels.
        file: path of a .pth or .safetensors file.
        use_ema: prefer averaged weights where the file has both.
        pad_type, bn_eps, bn_momentum: override the library's.

    Returns:
        The model. What it has no place for (the classifier of a model without classes, the head of a backbone) is
        left out.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, or its keys, shapes or values do not fit; the model is unchanged.
    """
    if isinstance(model, str):
        from effkernels.models.registry import create_model

        checkpoint = read_checkpoint(file, use_ema=use_ema)
        stem, classifier = checkpoint.tensor("stem"), checkpoint.tensor("classifier")
        model = create_model(
            model,
            in_chans=3 if stem is None or stem.ndim != 4 else stem.shape[1],
            num_classes=0 if classifier is None else classifier.shape[0],
        )
        return _load(model, checkpoint, pad_type, bn_eps, bn_momentum)
    return load_into(model, file, use_ema=use_ema, pad_type=pad_type, bn_eps=bn_eps, bn_momentum=bn_momentum)


def load_into(
    model: EfficientNet | EfficientNetFeatures,
    file: str | Path,
    *,
    use_ema: bool = True,
    pad_type: str | None = None,
    bn_eps: float | None = None,
    bn_momentum: float | None = None,
) -> EfficientNet | EfficientNetFeatures:
    """`load_checkpoint` for a model that exists."""
    return _load(model, read_checkpoint(file, use_ema=use_ema), pad_type, bn_eps, bn_momentum)


def _load(
    model: EfficientNet | EfficientNetFeatures,
    checkpoint: Checkpoint,
    pad_type: str | None,
    bn_eps: float | None,
    bn_momentum: float | None,
) -> EfficientNet | EfficientNetFeatures:
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError(f"{checkpoint.path}: the model is on the meta device and can hold no weights")
    tensors = _to_model_names(model, checkpoint, state)
    _check_fit(checkpoint, state, tensors)
    model.load_state_dict(tensors)
    variant = model.config.name.rpartition("_")[2] if model.config is not None else ""
    known = (Semantics(pad_type, bn_eps, bn_momentum), checkpoint.noted, checkpoint.layout.semantics(variant))
    pad_type = next((one.pad_type for one in known if one.pad_type is not None), None)
    if pad_type is not None:
        model.set_padding(pad_type)
    model.set_norm(
        eps=next((one.bn_eps for one in known if one.bn_eps is not None), None),
        momentum=next((one.bn_momentum for one in known if one.bn_momentum is not None), None),
    )
    return model


def _to_model_names(
    model: EfficientNet | EfficientNetFeatures, checkpoint: Checkpoint, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The checkpoint under the model's names; keys that no part of the network has keep the library's name."""
    names = translation(checkpoint.layout, TIMM, model.architecture)
    tensors: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        module, _, leaf = key.rpartition(".")
        translated = f"{names[module]}.{leaf}" if module in names else key
        if translated not in state and translated.partition(".")[0] in ("conv_head", "bn2", "classifier"):
            continue  # a backbone has no head, a model without classes no classifier
        expected = state.get(translated)
        if expected is not None and tensor.shape == expected.shape[:2] and expected.shape[2:] == (1, 1):
            tensor = tensor.reshape(expected.shape)  # squeeze-and-excitation as linear layers: the same numbers
        tensors[translated] = tensor
    for key, value in state.items():
        # Files of before PyTorch 0.4.1 do not count batches, and only a momentum of None reads the count.
        if key.endswith(".num_batches_tracked"):
            tensors.setdefault(key, value)
    return tensors


def _check_fit(checkpoint: Checkpoint, state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
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
    if misshaped and not missing and not unexpected and all(entry.startswith("classifier.") for entry in misshaped):
        classes = tensors["classifier.weight"].shape[0]
        hints.append(f"create the model with num_classes={classes}; reset_classifier() changes it afterwards")
    raise CheckpointError(
        "\n  ".join([f"{checkpoint.path} ({checkpoint.layout.name} keys) does not fit the model", *problems, *hints])
    )


def enumerated(entries: list[str]) -> str:
    """The first few of many keys, for a message."""
    more = len(entries) - _LISTED
    return ", ".join(entries[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse values that are not finite; tensors on the meta device have none.

    Raises:
        CheckpointError: with the first key that has some; the message begins with `where`.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{where}: {key} has {count} of {tensor.numel()} values that are NaN or infinite")


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a file of tensors: it is no PyTorch checkpoint, or it holds pickled objects, which are "
            f"never run. Save model.state_dict() instead of the model. ({_first_line(error)})"
        ) from error
    except (EOFError, RuntimeError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or is cut off ({_first_line(error)})") from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path}: reading .safetensors needs the package safetensors: pip install 'effkernels[models]'"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is cut off ({_first_line(error)})") from error


def _noted_semantics(path: Path) -> Semantics:
    """What stands in the metadata of a safetensors file of this project; nothing in everybody else's."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("effkernels")
    if text is None:
        return Semantics()
    try:
        note = json.loads(text)
        return Semantics(note.get("pad_type"), note.get("bn_eps"), note.get("bn_momentum"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata under 'effkernels' is not what this project writes") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _unwrap(path: Path, content: Any, use_ema: bool) -> dict[str, Tensor]:
    wrappers = (*_EMA_WRAPPERS, *_WRAPPERS) if use_ema else (*_WRAPPERS, *_EMA_WRAPPERS)
    while isinstance(content, Mapping):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a dict of tensors is needed")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under any of the known names ({', '.join(wrappers)})")
    return without_prefixes(tensors)

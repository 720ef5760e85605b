"""The images of a training: torchvision's ImageFolder layout, or scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from effkernels.engine.images import read_image
from effkernels.files import printable
from effkernels.models.peers import import_torchvision
from effkernels.scaling.digits import CLASSES, digits
from effkernels.train.options import OptionError, TrainOptions
from effkernels.train.random_numbers import seed_for

if TYPE_CHECKING:
    import PIL.Image

_EVALUATION_FOLDERS = ("val", "validation", "test")
_TRAINING_DIGITS = 1437  # of 1797; the other fifth is held out


class Images(Protocol):
    """Labelled images that are decoded when they are asked for."""

    @property
    def labels(self) -> Sequence[int]:
        """The class of each image."""

    def name(self, index: int) -> str:
        """Return the name of an image, for messages."""

    def image(self, index: int) -> PIL.Image.Image:
        """Return an image as RGB; any error if it cannot be read."""


@dataclass(frozen=True)
class FileImages:
    """Image files."""

    files: Sequence[str]
    labels: Sequence[int]

    def name(self, index: int) -> str:
        """Return the file."""
        return self.files[index]

    def image(self, index: int) -> PIL.Image.Image:
        """Return the image as `read_image` decodes it."""
        return read_image(Path(self.files[index]))


@dataclass(frozen=True)
class DigitImages:
    """Digits of scikit-learn: pixels (N, 8, 8), uint8."""

    pixels: torch.Tensor
    labels: Sequence[int]

    def name(self, index: int) -> str:
        """Return the number of the image."""
        return f"digit {index}"

    def image(self, index: int) -> PIL.Image.Image:
        """Return the image as RGB, which is what `effkernels predict` gives a network."""
        import PIL.Image

        return PIL.Image.fromarray(self.pixels[index].numpy()).convert("RGB")


@dataclass(frozen=True)
class Data:
    """Images to train and to evaluate with, and the names of their classes."""

    classes: tuple[str, ...]
    train: Images
    evaluation: Images


def load_data(options: TrainOptions) -> Data:
    """Find the images of `options.data`; no image file is opened.

    Raises:
        OptionError: no such folder, no class folder, one without images, other classes to evaluate than to train with,
            or a name that cannot be a line of a file of labels.
        ImportError: torchvision or scikit-learn is needed and not installed.
    """
    return _digits() if options.is_digits else _folder(options)


def _digits() -> Data:
    split = digits(_TRAINING_DIGITS)
    train, evaluation = (
        DigitImages(((images[:, 0] + 1) * 127.5).round().to(torch.uint8), labels.tolist())
        for images, labels in ((split.train_images, split.train_labels), (split.test_images, split.test_labels))
    )
    return Data(tuple(map(str, range(CLASSES))), train, evaluation)


def _folder(options: TrainOptions) -> Data:
    try:
        import_torchvision()
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError("image folders need torchvision: pip install 'effkernels[train]'") from error
    root = Path(options.data)
    if not root.is_dir():
        raise OptionError("data", options.data, "no such folder; allowed: a folder of class folders, or digits")

    def found(folder: Path) -> Any:
        try:
            return ImageFolder(str(folder))
        except OSError as error:  # no class folder, or one without images: torchvision says which
            raise OptionError("data", options.data, str(error)) from error

    if not (root / "train").is_dir():
        folder = found(root)
        held_out = _held_out(folder.targets, options)
        kept = [index for index in range(len(folder.samples)) if index not in held_out]
        train, evaluation = ([folder.samples[index] for index in part] for part in (kept, sorted(held_out)))
        classes = folder.classes
    else:
        second = next((root / name for name in _EVALUATION_FOLDERS if (root / name).is_dir()), None)
        if second is None:
            allowed = ", ".join(_EVALUATION_FOLDERS)
            raise OptionError("data", options.data, f"it has a folder train and none to evaluate; allowed: {allowed}")
        first, other = found(root / "train"), found(second)
        if first.classes != other.classes:  # ImageFolder numbers the classes of each folder on its own
            differing = ", ".join(sorted(set(first.classes) ^ set(other.classes)))
            raise OptionError(
                "data", options.data, f"train and {second.name} need the same class folders; only one has {differing}"
            )
        train, evaluation, classes = first.samples, other.samples, first.classes
    for name in classes:
        if name.splitlines() != [name] or not name.isprintable():
            raise OptionError(
                "data", options.data, f"the class folder {printable(name)!r} cannot be a line of labels.txt; rename it"
            )
    return Data(tuple(classes), *(FileImages(*zip(*samples, strict=True)) for samples in (train, evaluation)))


def _held_out(labels: Sequence[int], options: TrainOptions) -> set[int]:
    """Return the images to evaluate with: `val_split` of each class, at least one, drawn by the seed."""
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    generator = torch.Generator().manual_seed(seed_for("split", options.seed))
    held_out: set[int] = set()
    for members in of_class.values():
        count = max(1, round(options.val_split * len(members)))
        if count >= len(members):
            reason = f"of a class with {len(members)} images none is left to train; give more, or folders train and val"
            raise OptionError("val_split", options.val_split, reason)
        order = torch.randperm(len(members), generator=generator).tolist()
        held_out.update(members[position] for position in order[:count])
    return held_out

"""Photographs in, class predictions out: finding files, decoding, preprocessing, batching.

Preprocessing is that of the ImageNet recipes (and of timm's evaluation transform): the shorter side resized to
img_size / crop_pct, a central square of img_size cut out, values to [0, 1], then mean and standard deviation taken
out per channel. Needs Pillow and numpy, which the extra ``models`` brings.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effkernels.files import check_regular, printable, read_text

if TYPE_CHECKING:
    import PIL.Image

    from effkernels.models import ModelConfig

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
# What Pillow decodes by itself. It would hand PostScript to Ghostscript, a program of its own, and there are formats
# that nobody sends photographs in and few have looked for holes.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"
)  # fmt: skip
# Images longer than this many times their shorter side are cropped before they are resized.
LONGEST_RESIZED = 16
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


def example_image() -> Path:
    """The photograph that scikit-image ships as `skimage.data.astronaut()`, as a file.

    Raises:
        ImportError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ImportError("the example photograph comes with scikit-image: pip install 'effkernels[models]'")
    return Path(spec.origin).parent / "data" / "astronaut.png"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a model.

    Attributes:
        img_size: height and width of the input in pixels.
        crop_pct: img_size over the length that the shorter side is resized to, in (0, 1].
        interpolation: 'nearest', 'bilinear', 'bicubic' or 'lanczos'.
        mean, std: per channel (red, green, blue), of values in [0, 1].
    """

    img_size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.img_size < 1:
            raise ValueError(f"Preprocessing: img_size={self.img_size}; at least 1 is needed")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"Preprocessing: crop_pct={self.crop_pct}; allowed: above 0, at most 1")
        if self.interpolation not in _INTERPOLATIONS:
            allowed = ", ".join(_INTERPOLATIONS)
            raise ValueError(f"Preprocessing: interpolation={self.interpolation!r}; allowed: {allowed}")

    @classmethod
    def of(cls, config: ModelConfig, img_size: int | None = None) -> Preprocessing:
        """What a model was designed for (``effkernels.models.model_config(name)``), optionally at another size."""
        size = config.input_size[-1] if img_size is None else img_size
        return cls(size, config.crop_pct, config.interpolation, config.mean, config.std)

    def placement(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What an image of width x height pixels is resized to, (width, height), and the (left, top) of the crop."""
        short = math.floor(self.img_size / self.crop_pct)
        resized = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        return resized, (round((resized[0] - self.img_size) / 2), round((resized[1] - self.img_size) / 2))

    def __call__(self, image: PIL.Image.Image) -> Tensor:
        """A decoded RGB image as a tensor, (3, img_size, img_size), float32, normalised."""
        import numpy
        import PIL.Image

        size = self.img_size
        width, height = image.size
        resized, (left, top) = self.placement(width, height)
        resample = PIL.Image.Resampling[self.interpolation.upper()]
        if max(resized) <= LONGEST_RESIZED * min(resized):
            cut = image.resize(resized, resample).crop((left, top, left + size, top + size))
        else:
            # A panorama would become gigantic. Resizing only what the crop keeps is the same up to roundings.
            across, down = width / resized[0], height / resized[1]
            right, bottom = min((left + size) * across, width), min((top + size) * down, height)
            cut = image.resize((size, size), resample, box=(left * across, top * down, right, bottom))
        pixels = torch.from_numpy(numpy.array(cut, dtype=numpy.uint8)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


class ImageError(ValueError):
    """A file or an image of which no RGB picture can be made; the message says why, in one line."""


@dataclass(frozen=True)
class Failure:
    """A file, folder or pattern that gave no prediction, and why, in one line.

    `file` is the name as the system has it: bytes that are not UTF-8 are surrogates, and control characters are what
    they are. `effkernels.files.printable` makes it fit for a terminal.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class Score:
    """One class: its index, its label (the index again where there are no labels) and its probability in [0, 1]."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one file, the best first."""

    file: str
    scores: tuple[Score, ...]


def find_images(arguments: Iterable[str]) -> tuple[list[Path], list[Failure]]:
    """Files named by a command line: each argument is a file, a folder (searched in depth) or a glob pattern.

    A file that is named itself is taken whatever its suffix; in a folder those with a suffix of `IMAGE_SUFFIXES`
    count, and hidden ones do not. No file is listed twice.
    """
    found: dict[Path, None] = {}
    failures = []
    for argument in arguments:
        path = Path(argument)
        try:
            is_there = path.exists()
            matches = [path] if is_there else [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        except (OSError, ValueError) as error:  # a name that is too long, or has a null character
            failures.append(Failure(argument, getattr(error, "strerror", None) or str(error)))
            continue
        if not matches:
            reason = "the pattern matches nothing" if glob.has_magic(argument) else "no such file or folder"
            failures.append(Failure(argument, reason))
        for match in matches:
            if not match.is_dir():
                found[match] = None
                continue
            inside = [
                file
                for file in sorted(match.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(match).parts)
            ]
            if not inside:
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                failures.append(Failure(str(match), f"no images in this folder (looked for {suffixes})"))
            found.update(dict.fromkeys(inside))
    return list(found), failures


def read_image(file: Path) -> PIL.Image.Image:
    """Decode an image of any mode to RGB, upright; `as_rgb` says how.

    Raises:
        OSError: no such file, or a named pipe, device or folder.
        ImageError: no image of `IMAGE_FORMATS`, a damaged one, or one that `as_rgb` refuses.
    """
    check_regular(file)
    with file.open("rb") as content:
        return decode(content)


def decode(
    content: IO[bytes], *, formats: Sequence[str] = IMAGE_FORMATS, most_pixels: int | None = None
) -> PIL.Image.Image:
    """Decode an encoded image to RGB, upright; `as_rgb` says how.

    Args:
        content: of a file, at its beginning.
        formats: Pillow's names of those that are tried.
        most_pixels: an image with more is refused by its header, before anything is decoded; None: Pillow's limit of
            179 million.

    Raises:
        ImageError: no image of these formats, too large, damaged, or one that `as_rgb` refuses.
    """
    import PIL.Image

    PIL.Image.init()
    try:
        with PIL.Image.open(content, formats=[one for one in formats if one in PIL.Image.OPEN]) as opened:
            width, height = opened.size
            if not width * height:
                raise ImageError(f"{width} x {height} pixels; at least one is needed")
            if most_pixels is not None and width * height > most_pixels:
                raise ImageError(f"{width} x {height} pixels are {width * height}; allowed: {most_pixels}")
            return as_rgb(opened)
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"not an image file; known formats are {', '.join(formats)}") from error
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many types for damaged files
        raise ImageError(printable(" ".join(str(error).split())) or type(error).__name__) from error


def as_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An image as RGB, upright.

    Grey, palette, CMYK and 16-bit images are converted (of 16 bits, and of the 12 bits that some TIFF files have, the
    upper 8 stay), transparency is dropped, and the orientation that a camera noted is applied.

    Raises:
        ImageError: 32-bit integers, floating or signed numbers: no mode says which of them are black and white, and
            Pillow would cut them off at 0 and 255.
    """
    import numpy
    import PIL.Image
    import PIL.ImageOps

    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    from_netpbm = image.format == "PPM"  # which Pillow holds in 32 bits where it has 16
    if set(_numbers(tags.get(_SAMPLE_FORMAT))) - {_UNSIGNED, _UNDEFINED}:
        raise ImageError(f"{_NOT_CONVERTED} (TIFF of signed or floating numbers, mode {image.mode})")
    if image.mode == "F" or (image.mode == "I" and not from_netpbm):
        kind = "floating numbers" if image.mode == "F" else "32-bit integers"
        raise ImageError(f"{_NOT_CONVERTED} ({kind}, mode {image.mode})")
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip the values at 255 instead of scaling them.
        values = numpy.asarray(image)
        shift = 4 if 12 in _numbers(tags.get(_BITS)) else 8
        grey = (values >> shift).astype(numpy.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which Pillow turns round in 8 bits alone
            grey = 255 - grey
        return PIL.Image.fromarray(grey).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"mode {image.mode} cannot be converted to RGB") from error


# Tags of TIFF, and values of them.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO = 0
_UNSIGNED, _UNDEFINED = 1, 4
_NOT_CONVERTED = "which values are black and white is not known: convert it to 8 or 16 bits"


def _numbers(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _load(file: Path, preprocessing: Preprocessing) -> Tensor | Failure:
    try:
        return preprocessing(read_image(file))
    except Exception as error:  # whatever is wrong with one file must not stop the rest
        return Failure(str(file), getattr(error, "strerror", None) or str(error) or type(error).__name__)


def read_labels(file: Path) -> list[str]:
    """Class labels from a text file, one per line, line i for class i.

    Raises:
        OSError: no such file.
        ValueError: it is not UTF-8.
    """
    return read_text(file).splitlines()


def classify(
    model: nn.Module,
    files: Sequence[Path | str],
    *,
    preprocessing: Preprocessing | None = None,
    topk: int = 5,
    labels: Sequence[str] | None = None,
    batch_size: int = 16,
    amp_dtype: torch.dtype | None = None,
) -> Iterator[Prediction | Failure]:
    """Classify image files in order; a file that cannot be read gives a `Failure` and the rest goes on.

    Files are decoded by threads while the model works, one batch ahead.

    Args:
        model: takes (N, 3, S, S) and returns logits (N, classes); in eval mode, on the device and in the dtype wanted.
        preprocessing: by default what a model from ``effkernels.create_model`` was designed for.
        topk: how many classes to return; all of them where there are fewer.
        labels: one per class; by default the index stands for the label.
        amp_dtype: dtype of autocast, or None for the model's own.

    Raises:
        ValueError: topk or batch_size below 1, another number of labels than classes, or no preprocessing for a
            model that does not say which one it needs.
    """
    if topk < 1 or batch_size < 1:
        raise ValueError(f"classify: topk={topk}, batch_size={batch_size}; both must be at least 1")
    if preprocessing is None:
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError("classify: preprocessing=None needs a model with a config, as create_model returns it")
        preprocessing = Preprocessing.of(config)
    parameter = next(model.parameters())
    autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if amp_dtype is not None:
        autocast = torch.autocast(parameter.device.type, dtype=amp_dtype)

    def batch_results(names: Sequence[Path], loaded: Sequence[Tensor | Failure]) -> Iterator[Prediction | Failure]:
        tensors = [item for item in loaded if isinstance(item, Tensor)]
        probabilities = iter(())
        if tensors:
            images = torch.stack(tensors).to(parameter.device, parameter.dtype)
            with torch.inference_mode(), autocast:
                logits = model(images)
            if labels is not None and len(labels) != logits.shape[1]:
                raise ValueError(f"classify: {len(labels)} labels for a model of {logits.shape[1]} classes")
            probabilities = iter(torch.softmax(logits.float(), 1).cpu())
        for name, item in zip(names, loaded, strict=True):
            yield item if isinstance(item, Failure) else _best(str(name), next(probabilities), topk, labels)

    with ThreadPoolExecutor() as pool:
        remaining = iter([Path(file) for file in files])

        def start_batch() -> tuple[list[Path], Iterator[Tensor | Failure]]:
            names = list(itertools.islice(remaining, batch_size))
            return names, pool.map(_load, names, itertools.repeat(preprocessing))

        upcoming = start_batch()
        while upcoming[0]:
            names, loading = upcoming
            loaded = list(loading)
            upcoming = start_batch()
            yield from batch_results(names, loaded)


def _best(file: str, probabilities: Tensor, topk: int, labels: Sequence[str] | None) -> Prediction | Failure:
    if not bool(torch.isfinite(probabilities).all()):
        return Failure(file, "the model's output is not finite; are there NaN or infinite values in the weights?")
    values, indices = probabilities.topk(min(topk, len(probabilities)))
    return Prediction(
        file,
        tuple(
            Score(index, labels[index] if labels else str(index), value)
            for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        ),
    )

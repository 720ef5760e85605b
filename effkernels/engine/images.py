"""Image files: which ones a command line names, and their pixels as RGB."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from effkernels.files import check_regular, printable

if TYPE_CHECKING:
    import PIL.Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


# What Pillow decodes by itself. It would hand PostScript to Ghostscript, a program of its own, and there are formats
# that nobody sends photographs in and few have looked for holes.
IMAGE_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"
)  # fmt: skip


def example_image() -> Path:
    """Return the photograph that scikit-image ships as `skimage.data.astronaut()`, as a file.

    Raises:
        ImportError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ImportError("the example photograph comes with scikit-image: pip install 'effkernels[models]'")
    return Path(spec.origin).parent / "data" / "astronaut.png"


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


def find_images(arguments: Iterable[str]) -> tuple[list[Path], list[Failure]]:
    """Return the files that a command line names: each argument is a file, a folder (searched in depth) or a pattern.

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
    """Return an image as RGB, upright.

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

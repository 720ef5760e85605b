"""Cases of image files: exact values in every depth, damaged bytes, and names that a terminal could obey."""

from __future__ import annotations

import io
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy
import PIL.Image

from benchmarks.fuzz._checkpoints import damage
from effkernels.engine.images import ImageError, find_images, read_image
from effkernels.files import printable

Pixels = numpy.ndarray
REFUSED = None
_HEIGHT, _WIDTH = 5, 4


def _values(draw: random.Random, largest: int) -> Pixels:
    values = [draw.choice((0, largest, draw.randint(0, largest))) for _ in range(_HEIGHT * _WIDTH)]
    return numpy.array(values, numpy.int64).reshape(_HEIGHT, _WIDTH)


def _grey(values: Pixels, largest: int) -> Pixels:
    """Values of a grey image as RGB of 8 bits, exact before they are rounded."""
    return numpy.repeat((values * 255 / largest)[..., None], 3, 2)


def _saved(image: PIL.Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def _pgm(draw: random.Random) -> tuple[bytes, Pixels | None]:
    largest = draw.choice((1, 3, 200, 255, 256, 1023, 4095, 40_000, 65_535))
    values = _values(draw, largest)
    if draw.random() < 0.3:
        body, kind = " ".join(map(str, values.ravel().tolist())).encode(), b"P2"
    else:
        body, kind = values.astype(">u2" if largest > 255 else "u1").tobytes(), b"P5"
    return b"%s %d %d %d\n%s" % (kind, _WIDTH, _HEIGHT, largest, body), _grey(values, largest)


def _ppm(draw: random.Random) -> tuple[bytes, Pixels | None]:
    largest = draw.choice((255, 1023, 65_535))
    values = numpy.stack([_values(draw, largest) for _ in range(3)], 2)
    body = values.astype(">u2" if largest > 255 else "u1").tobytes()
    return b"P6 %d %d %d\n%s" % (_WIDTH, _HEIGHT, largest, body), values * 255 / largest


def _png(draw: random.Random) -> tuple[bytes, Pixels | None]:
    largest = draw.choice((255, 65_535))
    values = _values(draw, largest)
    return _saved(PIL.Image.fromarray(values.astype("u1" if largest == 255 else "u2")), "PNG"), _grey(values, largest)


def _colours(draw: random.Random) -> tuple[bytes, Pixels | None]:
    values = numpy.stack([_values(draw, 255) for _ in range(3)], 2)
    image = PIL.Image.fromarray(values.astype(numpy.uint8))
    form = draw.choice(("PNG", "BMP", "TIFF", "WEBP-lossless", "PPM", "TGA"))
    if form == "WEBP-lossless":
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", lossless=True)
        return buffer.getvalue(), values
    return _saved(image, form), values


_TIFF_KINDS = {
    # bits, format of a sample (1 unsigned, 2 signed, 3 floating), dtype; None: it is refused
    "unsigned 8": (8, 1, "<u1"),
    "unsigned 16": (16, 1, "<u2"),
    "unsigned 12": (12, 1, None),
    "unsigned 32": (32, 1, "<u4"),
    "signed 8": (8, 2, "<i1"),
    "signed 16": (16, 2, "<i2"),
    "signed 32": (32, 2, "<i4"),
    "floating 16": (16, 3, "<f2"),
    "floating 32": (32, 3, "<f4"),
    "floating 64": (64, 3, "<f8"),
}


def _tiff(draw: random.Random) -> tuple[bytes, Pixels | None]:
    bits, kind, dtype = _TIFF_KINDS[draw.choice(list(_TIFF_KINDS))]
    white_is_zero = draw.random() < 0.5
    largest = 2**bits - 1
    if kind == 1:
        values = _values(draw, largest)
        shown = largest - values if white_is_zero else values
        expected = _grey(shown, largest) if bits <= 16 else REFUSED
        if bits == 12 and white_is_zero:
            expected = REFUSED  # Pillow does not know it
        data = values.astype(dtype).tobytes() if dtype else _packed(values)
    else:
        assert dtype is not None
        data, expected = _values(draw, 100).astype(dtype).tobytes(), REFUSED
    return _tiff_file(bits, kind, 0 if white_is_zero else 1, data), expected


def _packed(values: Pixels) -> bytes:
    """Rows of numbers of 12 bits."""
    rows = []
    for row in values.tolist():
        text = "".join(f"{value:012b}" for value in row)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big"))
    return b"".join(rows)


def _tiff_file(bits: int, kind: int, photometric: int, data: bytes) -> bytes:
    short, long = 3, 4
    tags = [
        (256, short, _WIDTH), (257, short, _HEIGHT), (258, short, bits), (259, short, 1), (262, short, photometric),
        (273, long, 0), (277, short, 1), (278, short, _HEIGHT), (279, long, len(data)), (339, short, kind),
    ]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, size, value in tags:
        value = start if tag == 273 else value
        out += struct.pack("<HHI", tag, size, 1) + struct.pack("<I", value)
    return out + struct.pack("<I", 0) + data


def _pfm(draw: random.Random) -> tuple[bytes, Pixels | None]:
    return b"Pf\n%d %d\n-1.0\n" % (_WIDTH, _HEIGHT) + _values(draw, 100).astype("<f4").tobytes(), REFUSED


def _postscript(draw: random.Random) -> tuple[bytes, Pixels | None]:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 5\n%%EndComments\nshowpage\n", REFUSED


def _not_an_image(draw: random.Random) -> tuple[bytes, Pixels | None]:
    return draw.choice(
        (b"", b"\0", b"text", draw.randbytes(100), b"P5 -1 4 255\n", b"P5 0 0 255\n", b"BM" + bytes(60))
    ), REFUSED


_MAKERS: tuple[Callable[[random.Random], tuple[bytes, Pixels | None]], ...] = (
    _pgm, _ppm, _png, _colours, _tiff, _tiff, _pfm, _postscript, _not_an_image,
)  # fmt: skip


def values_case(draw: random.Random, folder: Path) -> tuple[str, str | None]:
    """An image of some depth and kind has the right values, within one of 255, or is refused by the one error."""
    make = draw.choice(_MAKERS)
    raw, expected = make(draw)
    path = folder / "image"
    path.write_bytes(raw)
    name = f"values: {make.__name__.strip('_')}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = numpy.asarray(read_image(path), numpy.float64)
    except ImageError as error:
        if expected is not None:
            return name, f"is refused: {error}"
        return name, None if str(error).isprintable() else f"the message is {str(error)!r}"
    except Exception as error:
        return name, f"escapes as {type(error).__name__}: {error}"
    if expected is None:
        return name, f"is read as {found.ravel()[:6]}"
    worst = float(numpy.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
    return name, None if worst <= 1.0 else f"the values are up to {worst:.0f} off"


def damaged_case(draw: random.Random, folder: Path) -> tuple[str, str | None]:
    """Check that an image with damaged bytes is RGB, or refused by the one error."""
    make = draw.choice(_MAKERS[:6])
    path = folder / "damaged"
    path.write_bytes(damage(draw, make(draw)[0]))
    name = f"damaged: {make.__name__.strip('_')}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = read_image(path)
    except ImageError as error:
        return name, None if str(error).isprintable() else f"the message is {str(error)!r}"
    except Exception as error:
        return name, f"escapes as {type(error).__name__}: {error}"
    return name, None if image.mode == "RGB" and min(image.size) > 0 else f"is {image.mode}, {image.size}"


_LETTERS = (
    "a",
    "é",
    "中",
    "\udcff",
    "\udc80",
    "\x1b[2J",
    "\n",
    "\r",
    "\t",
    "\u202e",
    "\x7f",
    "'",
    "[red]",
    "%s",
    "\\",
    " ",
    "*",
    "$",
    "[",
)


def name_case(draw: random.Random, folder: Path) -> tuple[str, str | None]:
    """Check that a file of a hostile name is found, read, and printed on one line."""
    name = "".join(draw.choice(_LETTERS) for _ in range(draw.randint(1, 12)))
    if draw.random() < 0.2:
        name = draw.choice(("a" * 300, "b/" * 3000, "a\0b", "", "**", "\udcff" * 200))
    path = folder / "names" / (name + ".png")
    made = False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_saved(PIL.Image.new("RGB", (2, 2)), "PNG"))
        made = True
    except (OSError, ValueError):
        pass
    try:
        files, failures = find_images([str(path)])
        texts = [printable(one) for one in (*files, *(f.file for f in failures), *(f.reason for f in failures))]
        for text in texts:
            text.encode()
            if not text.isprintable():
                return "name", f"{text!r} is not printable"
        if made:
            if files != [path]:
                return "name", f"{str(path)!r} is not found"
            read_image(path)
    except Exception as error:
        return "name", f"{name!r} escapes as {type(error).__name__}: {error}"
    finally:
        if made:
            path.unlink()
    return "name", None

"""``effkernels cam``: where in a photograph networks see a class; side by side, the paper's figure 7."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effkernels import console
from effkernels.bench.precision import PRECISIONS, Precision
from effkernels.cam import class_activation_map, normalised, peaks, upsampled
from effkernels.cam.figure import MOST_ROWS, Panel, figure_formats, save_grid
from effkernels.commands.common import (
    DEFAULT_MODEL,
    UsageError,
    add_device,
    add_json,
    check_output,
    device_of,
    labels_of,
    positive,
    writing,
)
from effkernels.files import printable
from effkernels.models import CheckpointError

if TYPE_CHECKING:
    import PIL.Image

    from effkernels.cam.networks import Subject
    from effkernels.models.preprocessing import Preprocessing

TEXT = "Draw class activation maps: the parts of a photograph that a network takes for a class."
_CAPTION = 30  # letters below a panel
_PICTURES = 6  # of --digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="a file, a folder (searched in depth) or a pattern")
    parser.add_argument("--example", action="store_true", help="also draw the photograph that comes with the package")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="a model of effkernels, or a network for `effkernels scale`: mobilenet_v2, timm:resnet50, a saved "
        "network's .json (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the network side by side with deeper (d=4), wider (w=2), higher resolution (r=2) and compound (d=1.4, "
        "w=1.2, r=1.3) scalings of it",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        metavar="FILE",
        help="checkpoint (.pth, .safetensors); with --compare one for each network, in the order above",
    )
    parser.add_argument(
        "--class",
        dest="wanted",
        metavar="N|NAME",
        help="the class to draw, by index or by label (default: the most probable one of each panel)",
    )
    parser.add_argument("--labels", metavar="FILE", help="text file with one class label per line")
    parser.add_argument(
        "--digits",
        nargs="?",
        type=positive,
        const=_PICTURES,
        metavar="PICTURES",
        help="no photographs and no weights: train small networks on scikit-learn's digits, hidden in larger pictures, "
        f"and draw their maps (default: {_PICTURES} pictures)",
    )
    parser.add_argument("--epochs", type=positive, metavar="N", help="of --digits (default: 10)")
    parser.add_argument("--img-size", type=positive, metavar="PIXELS", help="default: the model's own")
    parser.add_argument("--output", default="cam.png", metavar="FILE", help=".png, .pdf or .svg (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite --output")
    add_device(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: %(default)s")
    add_json(parser)


@dataclass(frozen=True)
class Drawn:
    """One panel in numbers, as ``--json`` prints it.

    Attributes:
        file, network: whose panel it is.
        index, label, probability: of the class that is drawn.
        peak: [x, y] of the largest value, in shares of the picture that the network saw.
        map: the values themselves, rows from the top; their mean plus the classifier's bias is the class's logit.
    """

    file: str
    network: str
    index: int
    label: str
    probability: float
    peak: list[float]
    map: list[list[float]]


@dataclass
class _Work:
    """The maps to draw, and the text to print about each network beside its costs."""

    subjects: list[Subject]
    pictures: list[tuple[str, PIL.Image.Image]]
    labels: list[str] | None
    failures: list[dict[str, str]]
    measured: list[dict[str, float]]


def run(arguments: argparse.Namespace) -> int:
    """Draw class activation maps."""
    _check_output(arguments.output, arguments.force)
    device = device_of(arguments.device)
    precision = Precision.of(arguments.precision, device.type)
    work = _photographs(arguments) if arguments.digits is None else _digits(arguments, device)
    wanted = None if arguments.wanted is None else _class_of(arguments.wanted, work.labels)

    drawn: list[Drawn] = []
    first = work.subjects[0].preprocessing
    panels = [[Panel(_shown(first, image), None, _short(Path(name).name))] for name, image in work.pictures]
    with console.progress("cam", len(work.subjects) * len(work.pictures)) as advance:
        for subject in work.subjects:
            subject.model.to(device, precision.dtype)
            for row, (name, image) in zip(panels, work.pictures, strict=True):
                one, panel = _draw(subject, name, image, wanted, work.labels, precision)
                drawn.append(one)
                row.append(panel)
                advance(f"{subject.name}: {name}")
            subject.model.to("cpu")  # five large networks need not share a GPU
    order = [name for name, _ in work.pictures]
    drawn.sort(key=lambda one: order.index(one.file))  # network beside network, as in the figure
    problem = None
    if panels:
        try:
            with writing("--output", arguments.output):
                save_grid(arguments.output, ["picture", *map(_title, work.subjects)], panels)
        except UsageError as error:  # the maps are printed all the same
            problem = error
    if arguments.json:
        print(json.dumps(_report(arguments, work, drawn, is_written=bool(panels) and problem is None), indent=1))
    elif drawn:
        _print_tables(work, drawn)
    for failure in work.failures:
        console.note(f"cam: {printable(failure['file'])}: {printable(failure['reason'])}")
    if problem is not None:
        raise problem
    if panels:
        console.note(f"cam: wrote {arguments.output}")
    return 1 if work.failures else 0


def _draw(
    subject: Subject,
    file: str,
    image: PIL.Image.Image,
    wanted: int | None,
    labels: list[str] | None,
    precision: Precision,
) -> tuple[Drawn, Panel]:
    """Return the map of one network for one image."""
    device = next(subject.model.parameters()).device
    inputs = subject.preprocessing(image)[None].to(device, precision.dtype)
    try:
        with torch.autocast(device.type, dtype=precision.autocast, enabled=precision.autocast is not None):
            maps, classes, probabilities = class_activation_map(subject.model, inputs, wanted)
    except ValueError as error:
        raise UsageError(f"{subject.name}: {error}") from error
    picture = _shown(subject.preprocessing, image)
    heat = upsampled(maps.cpu().float(), (picture.shape[0], picture.shape[1]))
    index, probability = int(classes[0]), float(probabilities[0])
    label = labels[index] if labels else str(index)
    drawn = Drawn(file, subject.name, index, label, probability, peaks(maps)[0].tolist(), maps[0].cpu().tolist())
    caption = f"{_short(label if labels else f'class {label}')}  {probability:.3f}"
    return drawn, Panel(picture, normalised(heat)[0], caption)


def _check_output(output: str, force: bool) -> None:
    """Refuse before the work what could not be written after it."""
    missing = [name for name in ("numpy", "PIL", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"cam needs {', '.join(missing)}: pip install 'effkernels[scaling]'")
    check_output("--output", output, force=force, suffixes=[f".{one}" for one in figure_formats()])


def _photographs(arguments: argparse.Namespace) -> _Work:
    """Return the networks and photographs that the arguments name."""
    from effkernels.engine.images import ImageError, example_image, find_images, read_image

    if arguments.epochs is not None:
        raise UsageError("--epochs: allowed only with --digits; nothing else is trained here")
    if not arguments.image and not arguments.example:
        raise UsageError("no IMAGE given; name files, folders or patterns, or use --example, or --digits")
    labels = None
    if arguments.labels is not None:
        labels = labels_of(arguments.labels)
    if arguments.wanted is not None:
        _class_of(arguments.wanted, labels)  # said before anything is loaded
    named = list(arguments.image)
    if arguments.example:
        try:
            named.append(os.path.relpath(example_image()))
        except ImportError as error:
            raise UsageError(f"--example: {error}") from error
    files, failed = find_images(named)
    if len(files) > MOST_ROWS:
        raise UsageError(f"{len(files)} images; one figure holds at most {MOST_ROWS}")
    failures = [asdict(failure) for failure in failed]
    pictures = []
    for file in files:
        try:
            pictures.append((str(file), read_image(file)))
        except (ImageError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            failures.append({"file": str(file), "reason": reason})
    subjects = _subjects(arguments)
    if labels is not None:
        for subject in subjects:
            if subject.num_classes != len(labels):
                raise UsageError(
                    f"--labels {arguments.labels}: {len(labels)} lines for a model of {subject.num_classes} classes"
                )
    return _Work(subjects, pictures, labels, failures, [{} for _ in subjects])


def _subjects(arguments: argparse.Namespace) -> list[Subject]:
    from effkernels.cam.networks import COMPARED, compared_subjects, named_subject
    from effkernels.scaling import find_network

    weights: list[str] | None = arguments.weights
    wanted = len(COMPARED) if arguments.compare else 1
    if weights is None:
        console.note(
            "WARNING: no --weights given: the weights are RANDOM and the maps mean nothing. Give "
            + (f"{wanted} checkpoints, one for each network" if arguments.compare else "a checkpoint: --weights FILE")
            + "; --digits trains small networks here"
        )
    elif len(weights) != wanted:
        order = f", in this order: {', '.join(by.name for by in COMPARED)}" if arguments.compare else ""
        raise UsageError(f"--weights: {len(weights)} files for {wanted} network{'s' * (wanted > 1)}{order}")
    try:
        if arguments.compare:
            return compared_subjects(find_network(arguments.model), weights, arguments.img_size)
        return [named_subject(arguments.model, weights[0] if weights else None, arguments.img_size)]
    except (CheckpointError, OSError) as error:
        raise UsageError(f"--weights: {error}") from error
    except (ValueError, ImportError) as error:
        raise UsageError(f"--model {arguments.model}: {error}") from error


def _digits(arguments: argparse.Namespace, device: torch.device) -> _Work:
    """Return the networks trained here, and pictures that they have not seen."""
    unused = {"IMAGE": arguments.image, "--example": arguments.example, "--weights": arguments.weights,
              "--labels": arguments.labels, "--img-size": arguments.img_size}  # fmt: skip
    for name, value in unused.items():
        if value:
            raise UsageError(f"--digits with {name}; allowed: no images and no weights, both are made here")
    if arguments.model != DEFAULT_MODEL:
        raise UsageError(f"--digits with --model {arguments.model}; allowed: only its own small network")
    if arguments.digits > MOST_ROWS:
        raise UsageError(f"--digits {arguments.digits}: one figure holds at most {MOST_ROWS}")
    from effkernels.cam.digits import as_photographs, digits_subjects, hide_digits, look_at_digits

    labels = [str(digit) for digit in range(10)]
    if arguments.wanted is not None and _class_of(arguments.wanted, labels) >= len(labels):
        raise UsageError(f"--class {arguments.wanted}: allowed: 0 to 9")  # said before anything is trained
    try:
        test = hide_digits(False, torch.Generator().manual_seed(1))
    except ImportError as error:
        raise UsageError(f"--digits: {error}") from error
    epochs = arguments.epochs or 10
    subjects, measured = [], []
    for subject in digits_subjects(arguments.compare, epochs, device, console.note):
        subjects.append(subject)
        measured.append(look_at_digits(subject.model, test, subject.preprocessing.img_size))
    # The network has to be moved by `run`, so that pictures are drawn in the precision that was asked for.
    subjects = [replace(subject, model=subject.model.cpu()) for subject in subjects]
    return _Work(subjects, as_photographs(test, arguments.digits), labels, [], measured)


def _class_of(text: str, labels: Sequence[str] | None) -> int:
    """Return the index of a class given as a number, a label, or one of a label's names ("tench, Tinca tinca")."""
    if text.isdecimal():
        return int(text)
    if labels is None:
        raise UsageError(f"--class {text}: a name needs --labels FILE; without, allowed: a number")
    name = text.strip().casefold()
    found = [
        i for i, label in enumerate(labels) if name in (part.strip().casefold() for part in [label, *label.split(",")])
    ]
    if len(found) != 1:
        reason = f"classes {', '.join(map(str, found))} have that name; give the number" if found else "no such label"
        raise UsageError(f"--class {text}: {reason}")
    return found[0]


def _shown(preprocessing: Preprocessing, image: PIL.Image.Image) -> Tensor:
    """Return the image as the network sees it, (S, S, 3), in [0, 1]."""
    plain = replace(preprocessing, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return plain(image).permute(1, 2, 0)


def _flops(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e9:.2f} GFLOPs" if multiply_adds >= 5e7 else f"{multiply_adds / 1e6:.1f} MFLOPs"


def _title(subject: Subject) -> str:
    """Return the title, with a note if the weights are random: a picture is passed on without its warnings."""
    lines = [subject.name, _flops(subject.multiply_adds), *(["RANDOM WEIGHTS"] if subject.weights is None else [])]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…"


def _report(arguments: argparse.Namespace, work: _Work, drawn: Sequence[Drawn], *, is_written: bool) -> dict[str, Any]:
    networks = [
        {
            "name": subject.name,
            "weights": subject.weights,
            "image_size": subject.preprocessing.img_size,
            "multiply_adds": subject.multiply_adds,
            "parameters": subject.parameters,
            **measured,
        }
        for subject, measured in zip(work.subjects, work.measured, strict=True)
    ]
    return {
        "model": arguments.model if arguments.digits is None else "DigitsNet",
        "output": arguments.output if is_written else None,
        "networks": networks,
        "maps": [asdict(one) for one in drawn],
        "failures": work.failures,
    }


def _print_tables(work: _Work, drawn: Sequence[Drawn]) -> None:
    extra = list(work.measured[0])
    rows = [
        [
            subject.name,
            str(subject.preprocessing.img_size),
            _flops(subject.multiply_adds),
            f"{subject.parameters / 1e6:.3g}",
            *(f"{measured[name]:.3f}" for name in extra),
        ]
        for subject, measured in zip(work.subjects, work.measured, strict=True)
    ]
    console.table(
        "networks", ["network", "pixels", "cost", "M parameters", *(e.replace("_", " ") for e in extra)], rows
    )
    print()
    rows = [
        [one.file, one.network, one.label, f"{one.probability:.4f}", f"{one.peak[0]:.0%}, {one.peak[1]:.0%}"]
        for one in drawn
    ]
    console.table("maps", ["image", "network", "class", "probability", "peak at x, y"], rows)

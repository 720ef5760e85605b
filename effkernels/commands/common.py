"""Shared by several commands: one kind of error, and arguments checked with messages that say what is allowed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from effkernels.files import printable
from effkernels.models import CheckpointError
from effkernels.models.sources import FORMS, ModelSource, find_model

DEFAULT_MODEL = "efficientnet_b0"


MODEL_HELP = f"{FORMS.replace('effkernels.list_models()', 'ours')}; default: {DEFAULT_MODEL}"


class UsageError(Exception):
    """Arguments that argparse accepts and the command cannot work with; reported in one line, exit status 2."""


@contextmanager
def reading(flag: str, name: object) -> Iterator[None]:
    """Turn errors in reading a checkpoint, or another file that a flag names, into errors in the use of the flag."""
    try:
        yield
    except (CheckpointError, OSError, ImportError) as error:
        shown, reason = printable(name), getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{flag} {reason}" if reason.startswith(shown) else f"{flag} {shown}: {reason}") from error


def labels_of(file: str) -> list[str]:
    """Return the class labels of ``--labels``."""
    from effkernels.engine.predict import read_labels

    with reading("--labels", file):
        try:
            return read_labels(Path(file))
        except UnicodeDecodeError as error:
            raise UsageError(f"--labels {printable(file)}: {error}") from error


def check_output(flag: str, output: str | Path, *, force: bool, suffixes: Sequence[str] = ()) -> Path:
    """Refuse before the work what could not be written after it.

    Args:
        flag: that names the file, for the message.
        output: the file.
        force: it may be there already.
        suffixes: one of which its name must end in, with their dots; (): any.

    Raises:
        UsageError: a folder, no folder to write into, or a file that exists.
    """
    path, name = Path(output), f"{flag} {printable(output)}"
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{name}: the name must end in one of {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise UsageError(f"{name} is a folder")
        if not path.parent.is_dir():
            raise UsageError(f"{name}: there is no folder {printable(path.parent)}")
        if path.exists() and not path.is_file():
            raise UsageError(f"{name} is a pipe or a device; a file is needed")
        if path.exists() and not force:
            raise UsageError(f"{name} exists; --force overwrites it")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{name}: the folder {printable(path.parent)} cannot be written to")
    except OSError as error:  # a name that is too long
        raise UsageError(f"{name}: {error.strerror}") from error
    return path


@contextmanager
def writing(flag: str, output: object) -> Iterator[None]:
    """Turn a file that cannot be written, as the disk is full, into an error that names its flag."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag} {printable(output)}: {error.strerror or error}") from error


def why_no_gpu() -> str:
    """Return why PyTorch has no GPU in this process, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU"


def device_of(name: str | None) -> torch.device:
    """Return the device asked for, or the GPU where there is one and the CPU otherwise."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; allowed: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed: cpu, cuda, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: {why_no_gpu()}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def model_source(text: str, flag: str = "--model") -> ModelSource:
    """Return the model that a text names, one of `FORMS`.

    Raises:
        UsageError: nothing of that name, or its library is not installed, or the hub cannot be reached.
    """
    with building(flag):
        return find_model(text)


@contextmanager
def building(flag: str = "--model") -> Iterator[None]:
    """Turn errors in finding or building a model into errors in the use of the flag that names it."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise UsageError(f"{flag}: {error}".removeprefix(": ")) from error


def positive(text: str) -> int:
    """Parse an argument that must be a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, to be read through `device_of`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")

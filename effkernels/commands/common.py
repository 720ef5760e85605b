"""What several commands need: one kind of error, and arguments checked with messages that say what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from effkernels.models import model_config

DEFAULT_MODEL = "efficientnet_b0"


class UsageError(Exception):
    """Arguments that argparse accepts and the command cannot work with; reported in one line, exit status 2."""


def why_no_gpu() -> str:
    """Why PyTorch has no GPU in this process, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and finds no GPU"


def device_of(name: str | None) -> torch.device:
    """The device asked for, or the GPU where there is one and the CPU otherwise."""
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


def check_models(names: Sequence[str]) -> None:
    """Refuse a model name that the registry does not know."""
    for name in names:
        try:
            model_config(name)
        except ValueError as error:
            raise UsageError(f"--model: {error}") from error


def positive(text: str) -> int:
    """An argument that must be a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, to be read through `device_of`."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON")

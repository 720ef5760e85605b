"""A small network under a name, images in folders, and ``effkernels train`` with both: here, or as a process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import safetensors.torch
import torch

from effkernels.cli import main
from effkernels.models import Architecture, ModelConfig, Stage, registry
from effkernels.models.registry import RegisteredModel

NAME = "efficientnet_small"
MODEL = RegisteredModel(
    ModelConfig(name=NAME, input_size=(3, 32, 32), dropout=0.1, crop_pct=0.875),
    Architecture(
        stem_channels=16,
        stages=(Stage(1, 3, 1, 16, 1), Stage(4, 3, 2, 24, 2), Stage(4, 5, 2, 48, 2)),
        head_channels=128,
    ),
)
PROGRAM = Path(__file__)


def make_folder(root: Path, images: int = 24, classes: tuple[str, ...] = ("blue", "green", "red")) -> Path:
    """Write images of 20 x 24 pixels, noise over a colour for each class, in torchvision's layout."""
    for number, name in enumerate(sorted(classes)):
        folder = root / name
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(number)
        for index in range(images):
            pixels = torch.randint(0, 120, (20, 24, 3), generator=generator, dtype=torch.uint8)
            pixels[..., number % 3] += 100
            PIL.Image.fromarray(pixels.numpy()).save(folder / f"{index:03}.png")
    return root


def arguments_for(data: str | Path, output: Path, *more: str) -> list[str]:
    """Return a command line for the small network; later flags win."""
    return ["train", "--data", str(data), "--output", str(output), "--model", NAME, "--img-size", "32",
            "--batch-size", "8", "--workers", "0", "--device", "cpu", *more]  # fmt: skip


def status_of(arguments: list[str]) -> int:
    """Run a command in this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        torch.set_num_threads(threads)


def log_of(output: Path) -> list[dict[str, Any]]:
    """Return the records of a log."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def numbers_of(output: Path) -> list[dict[str, Any]]:
    """Return the records of a log without the times, which differ from run to run."""
    timed = ("images_per_second", "seconds", "memory_bytes")
    return [{key: value for key, value in record.items() if key not in timed} for record in log_of(output)]


def assert_same_weights(one: Path, other: Path) -> None:
    """Compare the checkpoints of two trainings bit for bit, optimizers and averages included, and what was written."""

    def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from tensors(inner, f"{name}.{key}")

    states = [dict(tensors(torch.load(folder / "checkpoint.pt", weights_only=True))) for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [key for key in states[0] if not torch.equal(states[0][key], states[1][key])] == []
    written = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other)]
    assert [key for key in written[0] if not torch.equal(written[0][key], written[1][key])] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    registry.register(MODEL)
    sys.exit(main(sys.argv[1:]))

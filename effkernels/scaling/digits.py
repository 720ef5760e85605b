"""scikit-learn's handwritten digits, the one training on them, and an evaluation for the searches by it.

They need no download and train in seconds on a CPU. They are enough to try the method and far too few to conclude from:
1797 images of 8x8 pixels. The differences between candidates are about as large as those between two seeds, so several
are trained and their spread is reported.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effkernels.scaling.candidates import Candidate
from effkernels.scaling.families import build_sequential
from effkernels.scaling.network import Rounding, Stage, StagedNetwork

CLASSES = 10
CHANNELS = 1

_BLOCK = {"activation": "silu", "se_ratio": 0.25}
DIGITS_NETWORK = StagedNetwork(
    "digits-MBConv",
    16,
    (
        Stage("conv", 1, 8, 2, 3, {"activation": "silu"}, deepens=False),
        Stage("inverted_residual", 2, 8, 1, 3, {"expansion": 1, **_BLOCK}),
        Stage("inverted_residual", 3, 12, 2, 3, {"expansion": 3, **_BLOCK}),
        Stage("inverted_residual", 3, 20, 2, 3, {"expansion": 3, **_BLOCK}),
        Stage("conv", 1, 48, 1, 1, {"activation": "silu"}, deepens=False),
    ),
    build_sequential,
)
"""A baseline for the digits, of EfficientNet's blocks; ours, found by no search."""

DIGITS_ROUNDING = Rounding(divisor=2, depth="nearest", resolution=1)
"""Fine enough that few channels and few layers grow by the factors asked for, not by what rounding makes of them."""


def load_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits: images (1797, 8, 8) in [0, 1] in float32, and labels (1797,) in int64.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    loaded = _sklearn("datasets").load_digits()
    return torch.as_tensor(loaded.images, dtype=torch.float32) / 16, torch.as_tensor(loaded.target, dtype=torch.int64)


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'effkernels[scaling]'") from error


Batches = Iterable[tuple[Tensor, Tensor]]
"""Images (N, C, H, W) and labels (N,), as the network takes them."""


def train(
    build: Callable[[], nn.Module],
    epoch_of: Callable[[torch.Generator], Batches],
    *,
    epochs: int,
    steps: int,
    learning_rate: float,
    seed: int,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> nn.Module:
    """Train a classifier from random weights: AdamW under one cosine. The result depends on the arguments alone.

    Args:
        build: returns the network, in training mode.
        epoch_of: returns the batches of an epoch, drawn by a generator.
        epochs: passes over the data.
        steps: batches of an epoch.
        learning_rate: the highest.
        seed: of weights, data and order.
        after_epoch: called with the number of epochs done and the mean loss of the last.

    Returns:
        The network in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps)
        for epoch in range(1, epochs + 1):
            total, count = 0.0, 0
            for images, labels in epoch_of(generator):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                total, count = total + loss.item() * len(labels), count + len(labels)
            after_epoch(epoch, total / count)
    return model.eval()


@dataclass(frozen=True)
class Digits:
    """The digits, split once for all: (N, 1, 8, 8) in [-1, 1] and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def digits(train_images: int = 600) -> Digits:
    """Return the digits: some to train, drawn by a fixed seed with all classes alike, and the rest to test.

    Few images are for training, because the task is easy: accuracies differ more, and more images are left to measure
    them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    images, labels = load_digits()
    split = _sklearn("model_selection").train_test_split(
        range(len(labels)), train_size=train_images, random_state=0, stratify=labels
    )
    images = images[:, None] * 2 - 1
    (train_part, train_labels), (test_part, test_labels) = ((images[part], labels[part]) for part in split)
    return Digits(train_part, train_labels, test_part, test_labels)


@dataclass(frozen=True)
class DigitsEvaluation:
    """Accuracy on held-out digits after a short training, for `effkernels.scaling.search` and `search_baseline`.

    Images are enlarged to the network's resolution by bilinear interpolation. AdamW under one cosine, from random
    weights, moved by at most a pixel at random; the accuracy is that after the last epoch, in eval mode, so that the
    fused kernels compute it. The same seeds for all candidates; a seed decides weights, order and shifts, and with one
    number of threads the result is the same every time.

    Attributes:
        seeds: trainings, by seeds 0, 1, ...
        epochs: of each.
        batch_size: images.
        learning_rate: the highest.
        train_images: of the 1797; the rest is held out.
    """

    seeds: int = 3
    epochs: int = 12
    batch_size: int = 50
    learning_rate: float = 0.005
    train_images: int = 600

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"DigitsEvaluation: {name}={getattr(self, name)}; allowed: 1 or more")

    def __call__(self, candidate: Candidate) -> dict[str, float]:
        """Return the mean accuracy over the seeds, its standard deviation ("spread") and the number of seeds.

        Raises:
            ValueError: a candidate that does not take grey images or does not have ten classes.
        """
        if (candidate.num_classes, candidate.in_chans) != (CLASSES, CHANNELS):
            raise ValueError(
                f"the digits: num_classes={candidate.num_classes}, in_chans={candidate.in_chans}; "
                f"allowed: {CLASSES} and {CHANNELS}"
            )
        accuracies = [self._accuracy(candidate, seed) for seed in range(self.seeds)]
        spread = statistics.stdev(accuracies) if self.seeds > 1 else 0.0
        return {"accuracy": statistics.fmean(accuracies), "spread": spread, "seeds": float(self.seeds)}

    def _accuracy(self, candidate: Candidate, seed: int) -> float:
        data, resolution = digits(self.train_images), candidate.network.resolution
        images, test = enlarge(data.train_images, resolution), enlarge(data.test_images, resolution)

        def epoch_of(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
            for batch in torch.randperm(len(images), generator=generator).split(self.batch_size):
                yield _shift(images[batch], generator), data.train_labels[batch]

        steps = math.ceil(len(images) / self.batch_size)
        model = train(
            candidate.build, epoch_of, epochs=self.epochs, steps=steps, learning_rate=self.learning_rate, seed=seed
        )
        return _share_right(model, test, data.test_labels)


def enlarge(images: Tensor, resolution: int) -> Tensor:
    """Return images (N, 1, 8, 8) as (N, 1, resolution, resolution)."""
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", align_corners=False)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch moved by up to 1/8 of its size, one pixel of the original, by which the border is repeated."""
    most = images.shape[-1] // 8
    down, right = (int(torch.randint(-most, most + 1, (), generator=generator)) for _ in range(2))
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, mode="replicate") if most else images
    return padded[:, :, most + down : most + down + size, most + right : most + right + size]


@torch.inference_mode()
def _share_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = sum(
        int((model(part).argmax(1) == wanted).sum())
        for part, wanted in zip(images.split(256), labels.split(256), strict=True)
    )
    return right / len(labels)

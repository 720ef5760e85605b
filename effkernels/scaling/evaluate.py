"""An evaluation that needs no download: scikit-learn's handwritten digits, trained in seconds on a CPU.

Small enough to try the method, far too small to conclude from: 1797 images of 8x8 pixels. The differences between
candidates are about as large as those between two seeds, so several are trained and their spread is reported.
"""

from __future__ import annotations

import importlib
import math
import statistics
from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class Digits:
    """The digits, split once for all: (N, 1, 8, 8) in [-1, 1] and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def digits(train_images: int = 600) -> Digits:
    """scikit-learn's digits: so many of them, drawn by a fixed seed with all classes alike, to train; the rest to test.

    Few images to train on, because the task is easy: accuracies differ more, and more images are left to measure them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
        selection = importlib.import_module("sklearn.model_selection")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits need scikit-learn: pip install 'effkernels[scaling]'") from error
    loaded = datasets.load_digits()
    split = selection.train_test_split(
        loaded.images, loaded.target, train_size=train_images, random_state=0, stratify=loaded.target
    )
    train, test = (torch.as_tensor(part, dtype=torch.float32)[:, None] / 8 - 1 for part in split[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.int64) for part in split[2:])
    return Digits(train, train_labels, test, test_labels)


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
        """Mean accuracy over the seeds, its standard deviation ("spread") and the number of seeds.

        Raises:
            ValueError: a candidate that does not take grey images or does not have ten classes.
        """
        if (candidate.num_classes, candidate.in_chans) != (CLASSES, CHANNELS):
            raise ValueError(
                f"the digits: num_classes={candidate.num_classes}, in_chans={candidate.in_chans}; "
                f"allowed: {CLASSES} and {CHANNELS}"
            )
        accuracies = [self._train(candidate, seed) for seed in range(self.seeds)]
        spread = statistics.stdev(accuracies) if self.seeds > 1 else 0.0
        return {"accuracy": statistics.fmean(accuracies), "spread": spread, "seeds": float(self.seeds)}

    def _train(self, candidate: Candidate, seed: int) -> float:
        data = digits(self.train_images)
        resolution = candidate.network.resolution
        images, test = enlarge(data.train_images, resolution), enlarge(data.test_images, resolution)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = candidate.build()
            steps = self.epochs * math.ceil(len(images) / self.batch_size)
            optimizer = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
            for _ in range(self.epochs):
                for batch in torch.randperm(len(images), generator=generator).split(self.batch_size):
                    optimizer.zero_grad()
                    logits = model(_shift(images[batch], generator))
                    F.cross_entropy(logits, data.train_labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
        return _accuracy(model.eval(), test, data.test_labels)


def enlarge(images: Tensor, resolution: int) -> Tensor:
    """Images (N, 1, 8, 8) as (N, 1, resolution, resolution)."""
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", align_corners=False)


def _shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a batch moved by up to 1/8 of its size, one pixel of the original, by which the border is repeated."""
    most = images.shape[-1] // 8
    down, right = (int(torch.randint(-most, most + 1, (), generator=generator)) for _ in range(2))
    size = images.shape[-1]
    padded = F.pad(images, (most,) * 4, mode="replicate") if most else images
    return padded[:, :, most + down : most + down + size, most + right : most + right + size]


@torch.inference_mode()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    right = sum(
        int((model(part).argmax(1) == wanted).sum())
        for part, wanted in zip(images.split(256), labels.split(256), strict=True)
    )
    return right / len(labels)

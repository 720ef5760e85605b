"""Class predictions of image files, decoded by threads while the network works."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effkernels.engine.images import Failure, read_image
from effkernels.files import read_text
from effkernels.models.preprocessing import Preprocessing


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


def _load(file: Path, preprocessing: Preprocessing) -> Tensor | Failure:
    try:
        return preprocessing(read_image(file))
    except Exception as error:  # whatever is wrong with one file must not stop the rest
        return Failure(str(file), getattr(error, "strerror", None) or str(error) or type(error).__name__)


def read_labels(file: Path) -> list[str]:
    """Read class labels from a text file, one per line, line i for class i.

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
    """Classify image files in order; a file that cannot be read gives a `Failure` and the others are classified.

    Files are decoded by threads while the model works, one batch ahead.

    Args:
        model: takes (N, 3, S, S) and returns logits (N, classes); in eval mode, on the device and in the dtype wanted.
        preprocessing: by default what a model from ``effkernels.create_model`` was designed for.
        topk: how many classes to return; all of them if the model has fewer.
        labels: one per class; by default the index is the label.
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

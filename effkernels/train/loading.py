"""Batches: images decoded and prepared, those that cannot be read left out and named."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from effkernels.engine.images import Failure
from effkernels.files import printable
from effkernels.models.peers import import_torchvision
from effkernels.models.preprocessing import Preprocessing
from effkernels.train.data import Images
from effkernels.train.options import OptionError, TrainOptions
from effkernels.train.processes import Processes
from effkernels.train.random_numbers import cpu_generator, seed_for

if TYPE_CHECKING:
    import PIL.Image

_MOST_WORKERS = 8


class Example(NamedTuple):
    """An image, (3, S, S), its class, and the images that could not be read. The image is None if none could."""

    image: Tensor | None
    label: int
    failures: tuple[Failure, ...]


class Batch(NamedTuple):
    """Images (N, 3, S, S), classes (N,), and the files that were skipped for them."""

    images: Tensor
    labels: Tensor
    failures: tuple[Failure, ...]


def training_transform(options: TrainOptions, preprocessing: Preprocessing) -> Callable[[PIL.Image.Image], Tensor]:
    """Return the function that makes an image an example to train with.

    Raises:
        OptionError: torchvision is needed and not installed.
    """
    if options.augment == "none":
        return preprocessing
    try:
        import_torchvision()
        from torchvision.transforms import InterpolationMode, v2
    except ImportError as error:
        reason = "torchvision is needed: pip install 'effkernels[train]'; allowed without it: none"
        raise OptionError("augment", options.augment, reason) from error
    least = options.scale or (0.7 if options.is_digits else 0.08)
    hflip = (0.0 if options.is_digits else 0.5) if options.hflip is None else options.hflip
    mode = InterpolationMode(preprocessing.interpolation)
    steps: list[Any] = [
        v2.RandomResizedCrop(preprocessing.img_size, scale=(least, 1.0), interpolation=mode),
        v2.RandomHorizontalFlip(hflip),
    ]
    if options.augment == "randaugment":
        steps.append(v2.RandAugment())
    elif options.augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide())
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(preprocessing.mean, preprocessing.std),
    ]
    composed: Callable[[PIL.Image.Image], Tensor] = v2.Compose(steps)
    return composed


class TrainingExamples(Dataset[Example]):
    """Examples to train with, each augmented by a seed of its own.

    In place of an image that cannot be read comes the next one that can: batches keep their size, and the processes of
    a distributed training their steps.
    """

    def __init__(self, images: Images, transform: Callable[[PIL.Image.Image], Tensor], seed: int) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> Example:
        failures = []
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            with cpu_generator(seed_for("image", self.seed, self.epoch, index)):
                example = _read(self.images, at, self.transform)
            if isinstance(example, Failure):
                failures.append(example)
                continue
            return Example(example, self.images.labels[at], tuple(failures))
        return Example(None, -1, tuple(failures))


class EvaluationExamples(Dataset[Example]):
    """Examples to evaluate with; an image that cannot be read is left out."""

    def __init__(self, images: Images, transform: Callable[[PIL.Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> Example:
        example = _read(self.images, index, self.transform)
        if isinstance(example, Failure):
            return Example(None, -1, (example,))
        return Example(example, self.images.labels[index], ())


def _read(images: Images, index: int, transform: Callable[[PIL.Image.Image], Tensor]) -> Tensor | Failure:
    try:
        return transform(images.image(index))
    except Exception as error:  # whatever is wrong with one file must not stop the rest
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Failure(images.name(index), printable(reason))


def _joined(examples: Sequence[Example]) -> Batch:
    images = [example.image for example in examples if example.image is not None]
    labels = [example.label for example in examples if example.image is not None]
    failures = tuple(failure for example in examples for failure in example.failures)
    return Batch(torch.stack(images) if images else torch.empty(0), torch.tensor(labels), failures)


class Loaders:
    """Makes the batches of one process."""

    def __init__(
        self,
        options: TrainOptions,
        training: TrainingExamples,
        evaluation: EvaluationExamples,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._training = training
        self._evaluation = evaluation
        self._processes = processes
        self._sampler: DistributedSampler[Example] = DistributedSampler(
            training, processes.count, processes.rank, shuffle=True, seed=options.seed, drop_last=True
        )
        workers = options.workers
        if workers is None:
            cores = len(os.sched_getaffinity(0)) // processes.count
            workers = 0 if options.is_digits else min(_MOST_WORKERS, max(1, cores))
        self._batch_size = options.batch_size
        self._common: dict[str, Any] = {
            "batch_size": options.batch_size,
            "num_workers": workers,
            "collate_fn": _joined,
            "pin_memory": device.type == "cuda",
        }

    @property
    def steps(self) -> int:
        """Batches of an epoch in each process; a last one that is not full is left out."""
        return len(self._sampler) // self._batch_size

    @property
    def images_per_process(self) -> int:
        """Images of an epoch in each process."""
        return len(self._sampler)

    def epoch(self, epoch: int, start: int) -> DataLoader[Example]:
        """Return the batches of an epoch from the step `start` on; they depend on the seed and the epoch alone."""
        self._sampler.set_epoch(epoch)
        self._training.epoch = epoch
        order = list(self._sampler)[start * self._batch_size :]
        return DataLoader(self._training, sampler=order, drop_last=True, **self._common)

    def evaluation(self) -> DataLoader[Example]:
        """Return the batches of this process's share of the images to evaluate with; each image is in one share."""
        order = range(self._processes.rank, len(self._evaluation), self._processes.count)
        return DataLoader(self._evaluation, sampler=order, **self._common)

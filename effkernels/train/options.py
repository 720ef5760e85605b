"""The choices of a training, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

OPTIMIZERS = ("adamw", "sgd", "rmsprop")
PRECISIONS = ("float32", "amp", "amp_bfloat16", "amp_float16")
AUGMENTATIONS = ("basic", "none", "randaugment", "trivialaugment")
DIGITS = "digits"
"""The `data` that is scikit-learn's handwritten digits; a folder of that name is ``./digits``."""


class OptionError(ValueError):
    """A choice that is not allowed.

    Attributes:
        option: name of the field of `TrainOptions`.
        value: that was given.
        reason: why not, with what is allowed.
    """

    def __init__(self, option: str, value: object, reason: str) -> None:
        super().__init__(f"{option}={value!r}: {reason}")
        self.option = option
        self.value = value
        self.reason = reason


@dataclass(frozen=True)
class TrainOptions:
    """The choices of a training, with timm's names if it has them.

    Attributes:
        data: folder of images in torchvision's ImageFolder layout, a folder per class, under "train" and "val" or
            without them; or `DIGITS`.
        output: folder for checkpoints, log, plot, weights and labels.
        model: name for `create_model`, or "name.tag".
        weights: checkpoint to start from, as `load_checkpoint` reads it; None: none.
        pretrained: start from timm's published weights.
        num_classes: of the classifier, at least those of the data; None: those.
        img_size: height and width in pixels; None: the model's own, 32 for the digits.
        val_split: share of the images of each class that is held out where the data has no "val" folder, in (0, 1).
        epochs: passes over the training images.
        batch_size: images of a step in each process, at least 2.
        opt: of `OPTIMIZERS`.
        lr: the highest learning rate; None: that of `effkernels.train.optimizers.DEFAULTS`, as for weight_decay.
        weight_decay: of weights; biases and norms have none.
        momentum: of sgd and rmsprop.
        warmup_epochs: in which the learning rate grows linearly to `lr`; then it falls to `min_lr` as a cosine. None:
            a tenth of `epochs`, at most 1.
        min_lr: the learning rate after the last step.
        smoothing: of the labels, in [0, 1).
        drop: dropout before the classifier, in [0, 1); None: the paper's for the model.
        drop_path: stochastic depth at the last block, in [0, 1).
        model_ema_decay: of a moving average of weights and statistics, which is then evaluated and kept; None: none.
        clip_grad: largest norm of the gradient of all weights; None: any.
        precision: of `PRECISIONS`; "amp" is float16 on a GPU and bfloat16 on a CPU.
        augment: of `AUGMENTATIONS`. "none" prepares images as for the evaluation; the others crop, resize and mirror
            at random, with torchvision's RandAugment or TrivialAugmentWide on top.
        scale: least share of an image that a random crop keeps, in (0, 1]; None: 0.08, 0.7 for the digits.
        hflip: probability of mirroring; None: 0.5, 0 for the digits.
        seed: of weights, order, augmentation and dropping.
        workers: processes that load images, for each process that trains; 0: it loads them itself; None: one per core,
            at most 8, and 0 for the digits.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        sync_bn: norms take their statistics over all processes (GPUs only).
        checkpoint_steps: steps between checkpoints inside of an epoch; 0: one after each epoch.
    """

    data: str
    output: str
    model: str = "efficientnet_b0"
    weights: str | None = None
    pretrained: bool = False
    num_classes: int | None = None
    img_size: int | None = None
    val_split: float = 0.2
    epochs: int = 30
    batch_size: int = 64
    opt: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    momentum: float = 0.9
    warmup_epochs: float | None = None
    min_lr: float = 0.0
    smoothing: float = 0.1
    drop: float | None = None
    drop_path: float = 0.0
    model_ema_decay: float | None = None
    clip_grad: float | None = None
    precision: str = "float32"
    augment: str = "basic"
    scale: float | None = None
    hflip: float | None = None
    seed: int = 0
    workers: int | None = None
    device: str | None = None
    sync_bn: bool = False
    checkpoint_steps: int = 0

    def __post_init__(self) -> None:
        for name, (is_allowed, allowed) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise OptionError(name, value, f"allowed: {allowed}")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise OptionError("warmup_epochs", self.warmup_epochs, f"allowed: 0 to less than epochs={self.epochs}")
        if self.weights is not None and self.pretrained:
            raise OptionError("weights", self.weights, "allowed: weights or pretrained, not both")

    @property
    def is_digits(self) -> bool:
        """Whether the data is scikit-learn's digits."""
        return self.data == DIGITS

    def to_dict(self) -> dict[str, Any]:
        """Return the choices as plain numbers and words."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainOptions:
        """Return the choices that `to_dict` wrote.

        Raises:
            ValueError: a name that is not known, or a value that is not allowed.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"options {', '.join(map(repr, unknown))} are not known to this version")
        return cls(**values)


Rule = tuple[Callable[[Any], bool], str]


def _one_of(names: tuple[str, ...]) -> Rule:
    return (lambda value: value in names), ", ".join(names)


def _at_least(least: int) -> Rule:
    return (lambda value: value >= least), f"a whole number of at least {least}"


_SHARE: Rule = (lambda value: 0 <= value < 1), "0 to less than 1"
_NOT_NEGATIVE: Rule = (lambda value: 0 <= value < math.inf), "a finite number of at least 0"
_POSITIVE: Rule = (lambda value: 0 < value < math.inf), "a finite number above 0"

_RULES: dict[str, Rule] = {
    "num_classes": _at_least(1),
    "img_size": _at_least(1),
    "val_split": ((lambda value: 0 < value < 1), "above 0 and below 1"),
    "epochs": _at_least(1),
    # A batch norm cannot train on one value per channel, which one image may have in the last stage.
    "batch_size": _at_least(2),
    "opt": _one_of(OPTIMIZERS),
    "lr": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "momentum": _SHARE,
    "warmup_epochs": _NOT_NEGATIVE,
    "min_lr": _NOT_NEGATIVE,
    "smoothing": _SHARE,
    "drop": _SHARE,
    "drop_path": _SHARE,
    "model_ema_decay": _SHARE,
    "clip_grad": _POSITIVE,
    "precision": _one_of(PRECISIONS),
    "augment": _one_of(AUGMENTATIONS),
    "scale": ((lambda value: 0 < value <= 1), "above 0, at most 1"),
    "hflip": ((lambda value: 0 <= value <= 1), "0 to 1"),
    "seed": ((lambda value: 0 <= value < 2**32), "a whole number from 0 to 4294967295"),
    "workers": _at_least(0),
    "checkpoint_steps": _at_least(0),
}

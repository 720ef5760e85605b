"""PyTorch's optimizers and schedules, set up for a network of convolutions and norms."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from effkernels.train.options import TrainOptions


class Defaults(NamedTuple):
    """Learning rate and weight decay where none is given."""

    lr: float
    weight_decay: float


DEFAULTS = {
    "adamw": Defaults(lr=2e-3, weight_decay=0.05),
    "sgd": Defaults(lr=0.05, weight_decay=1e-4),
    "rmsprop": Defaults(lr=2e-3, weight_decay=1e-5),
}
"""Of `effkernels.train.options.OPTIMIZERS`. The weight decay of rmsprop is the paper's (section 5.2)."""

_WARMUP_START = 1e-2  # of the highest learning rate, at the first step


def make_optimizer(model: nn.Module, options: TrainOptions) -> Optimizer:
    """Return the optimizer. Biases and the weights of norms do not decay."""
    defaults = DEFAULTS[options.opt]
    lr = defaults.lr if options.lr is None else options.lr
    decay = defaults.weight_decay if options.weight_decay is None else options.weight_decay
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    if options.opt == "adamw":
        return AdamW(groups, lr)
    if options.opt == "sgd":
        return SGD(groups, lr, momentum=options.momentum, nesterov=options.momentum > 0)
    # alpha as in the paper; eps as in the TensorFlow training of EfficientNet.
    return RMSprop(groups, lr, alpha=0.9, eps=1e-3, momentum=options.momentum)


def make_schedule(optimizer: Optimizer, options: TrainOptions, steps: int) -> LRScheduler:
    """Return the schedule, stepped after every step of the optimizer: a linear warm-up, then a cosine to `min_lr`.

    Args:
        steps: of an epoch.
    """
    epochs = min(1.0, options.epochs / 10) if options.warmup_epochs is None else options.warmup_epochs
    warmup = round(epochs * steps)
    cosine = CosineAnnealingLR(optimizer, max(1, options.epochs * steps - warmup), options.min_lr)
    if warmup == 0:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, _WARMUP_START, 1.0, warmup), cosine], [warmup])

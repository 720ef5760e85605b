"""Training of classifiers of `create_model`: what ``effkernels train`` does, for programs.

Optimizers, schedules, averaging, mixed precision and processes are PyTorch's, the augmentation torchvision's.
"""

from __future__ import annotations

from effkernels.train.options import OptionError, TrainOptions
from effkernels.train.training import Result, Training, TrainingError

__all__ = ["OptionError", "Result", "TrainOptions", "Training", "TrainingError"]

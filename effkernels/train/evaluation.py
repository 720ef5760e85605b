"""Loss and accuracy of images that were held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from effkernels.engine.images import Failure
from effkernels.train.loading import Batch
from effkernels.train.processes import Processes


class Evaluation(NamedTuple):
    """Means over the images: cross-entropy without smoothing, and the share whose most probable class is theirs."""

    loss: float
    accuracy: float
    images: int


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    processes: Processes,
    skip: Callable[[Failure], None],
) -> Evaluation:
    """Evaluate a model, which is left in training mode, on the batches of all processes.

    Args:
        model: without a wrapper for several processes.
        batches: of this process.
        device: of the model.
        autocast: makes the context of a forward.
        processes: that evaluate together.
        skip: called with each image that could not be read.
    """
    processes.share_buffers(model)
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        for failure in batch.failures:
            skip(failure)
        if not len(batch.labels):
            continue
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        with autocast():
            logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([loss, (logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=device)])
    model.train()
    loss_sum, right, count = processes.sum(sums).tolist()
    return Evaluation(loss_sum / max(count, 1), right / max(count, 1), int(count))

"""An exported network is held against the one it was made from before its file is left on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effkernels.export.sizes import Sizes
from effkernels.models import EfficientNet, EfficientNetFeatures
from effkernels.nn import ConvBnAct, DepthwiseSeparable, MBConv
from effkernels.ops.backends import backend
from effkernels.ops.parity import judge

# All inputs are judged as one, and a handful of logits would be judged by luck: images are drawn until there are this
# many numbers of every output, or as often as _DRAWS.
_ENOUGH = 1000
_DRAWS = 4

_OWNERS = (EfficientNet, EfficientNetFeatures, ConvBnAct, DepthwiseSeparable, MBConv)  # have a backend of their own

Run = Callable[[Tensor], Any]
"""An exported network: images (N, C, H, W) in; a tensor, or lists, tuples and dicts of them, out."""


@dataclass(frozen=True)
class Parity:
    """The error of an exported network against float64 and its limit, where the error is nearest to the limit.

    Attributes:
        ok: within the rule of `effkernels.ops.parity`.
        error, limit: of the output and the measure that are nearest to breaking it, relative.
        shapes: of the inputs it was run on, (batch, channels, height, width).
    """

    ok: bool
    error: float
    limit: float
    shapes: tuple[tuple[int, int, int, int], ...]


@contextmanager
def on_reference(model: nn.Module) -> Iterator[None]:
    """Run every operator of `model` in plain PyTorch, also where the model names a backend of its own."""
    # A model comes before its blocks, so that they have their own again in the end: it sets its choice on them.
    owners = [module for module in model.modules() if isinstance(module, _OWNERS)]
    before = [owner.backend for owner in owners]
    for owner in owners:
        owner.backend = "reference"
    try:
        with backend("reference"):
            yield
    finally:
        for owner, name in zip(owners, before, strict=True):
            owner.backend = name


def verify(run: Run, model: nn.Module, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Parity:
    """Hold `run` against `model` at several sizes by the rule of `effkernels.ops.parity`.

    Args:
        run: the exported network.
        model: what it was exported from, in eval mode, of that dtype and on that device.
        sizes: what `run` takes.
        dtype, device: of the images.
    """
    yardstick = _Yardstick(model, device)
    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[list[Tensor], ...]] = []  # of each: the file's outputs, PyTorch's in two layouts, float64's
    shapes: dict[tuple[int, int, int, int], None] = {}
    for draw in range(_DRAWS):
        if draw > 0 and min(map(len, _columns(calls)[0])) >= _ENOUGH:
            break
        for (height, width), batches in sizes.probes():
            images = torch.randn(batches[-1], sizes.channels, height, width, generator=generator).to(dtype)
            ways = yardstick(images)
            for batch in batches if draw == 0 else batches[-1:]:
                shape = (batch, sizes.channels, height, width)
                with torch.no_grad():
                    result = [output.detach().cpu() for output in tree_leaves(run(images[:batch].to(device)))]
                expected = [[output[:batch] for output in outputs] for outputs in ways]
                if [output.shape for output in result] != [output.shape for output in expected[0]]:
                    return Parity(False, math.inf, 0.0, (shape,))
                calls.append((result, *expected))
                shapes[shape] = None
    results, plain, other, truth = _columns(calls)
    found = [judge(results, own, truth) for own in (plain, other)]
    ok, error, limit = max(found, key=lambda one: one[2])
    return Parity(ok, error, limit, tuple(shapes))


class _Yardstick:
    """Plain PyTorch's results for images: in the model's dtype with NCHW and with channels_last tensors, in float64.

    A deep network multiplies rounding errors by chance, so PyTorch's own error is that of its worse layout.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.model = model
        self.turned = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.exact = copy.deepcopy(model).cpu().double()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        here = images.to(self.device)
        turned = here.contiguous(memory_format=torch.channels_last)
        runs = ((self.model, here), (self.turned, turned), (self.exact, images.double()))
        plain, other, truth = (self._outputs(model, x) for model, x in runs)
        return plain, other, truth

    @staticmethod
    def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
        with on_reference(model):
            return [output.cpu() for output in tree_leaves(model(x))]


def _columns(calls: Sequence[tuple[list[Tensor], ...]]) -> list[list[Tensor]]:
    """Return for each way of computing its outputs, each of all calls as one long tensor."""
    return [
        [torch.cat([part.flatten() for part in parts]) for parts in zip(*outputs, strict=True)]
        for outputs in zip(*calls, strict=True)
    ]

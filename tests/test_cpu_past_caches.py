"""Results of the CPU's kernels that are larger than the caches: written past them, with the same bits.

A batch is that large, each of its images is not, and every element of an image is computed from that image alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effkernels import _library
from effkernels.ops import training_steps as steps

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="no operator library")

BATCH, SIZE = 3, 224
LARGE = 4 << 20  # elements: is_past_caches in csrc/cpu/vector.h


def folded(channels: int) -> steps.FoldedNorm:
    return steps.FoldedNorm(*(torch.rand(channels) + 0.5 for _ in range(4)))


def coefficients(channels: int) -> steps.Coefficients:
    return steps.Coefficients(*(torch.randn(channels) for _ in range(3)))


Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # of two images and a factor of each sample and channel


def runs(channels: int) -> dict[str, Run]:
    norm, other, of_norm = folded(channels), folded(channels), coefficients(channels)
    matrix, taps = torch.randn(channels, channels, 1, 1), torch.randn(channels, 1, 3, 3)
    window = taps, 1, (1, 1, 1, 1), 1
    return {
        "pointwise": lambda t, g, f: steps.pointwise(t, matrix, None, g),
        "norm_act": lambda t, g, f: steps.norm_act(t, norm, "silu", f, g),
        "gradient_sums": lambda t, g, f: steps.gradient_sums(g, t, norm, "silu", f, True)[1],
        "norm_backward": lambda t, g, f: steps.norm_backward(g, t, norm, of_norm, f, "silu"),
        "depthwise_backward": lambda t, g, f: steps.depthwise_backward(
            g, t, other, "silu", f, f, of_norm, t, norm, "silu", *window
        )[0],
        "depthwise_backward without a norm": lambda t, g, f: steps.depthwise_backward(
            g, t, other, "silu", f, f, of_norm, t, None, "identity", *window
        )[0],
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize("name", list(runs(1)))
def test_an_image_of_a_large_batch_has_the_bits_of_the_image_alone(name: str, channels: int, threads: int) -> None:
    torch.manual_seed(channels)
    run = runs(channels)[name]
    t, g = torch.randn(2, BATCH, SIZE, SIZE, channels)
    factor = torch.rand(BATCH, channels)
    assert t.numel() > LARGE > t[0].numel()
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    try:
        found = run(t, g, factor)
        for i in range(BATCH):
            alone = run(t[i : i + 1], g[i : i + 1], factor[i : i + 1])
            assert torch.equal(found[i : i + 1], alone)
    finally:
        torch.set_num_threads(before)

"""The CPU kernel of expand and depthwise in one: the same bits as one after the other, and no expanded tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import flat, laid_out
from torch import Tensor

from effkernels import _library, ops

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

# (input channels, expanded channels, height, width, kernel, stride, padding, dilation). What each is for:
SHAPES = {
    "several rows a fill": (24, 100, 9, 7, 3, 1, (1, 1, 1, 1), 1),
    "one column": (5, 7, 20, 1, 5, 1, (2, 2, 2, 2), 1),
    "several bands": (16, 40, 61, 30, 3, 1, (1, 1, 1, 1), 1),
    "several bands, stride 2": (8, 33, 75, 20, 5, 2, (1, 2, 1, 2), 1),
    "sums in blocks": (130, 48, 6, 14, 3, 1, (1, 1, 1, 1), 1),
    "packed weights in groups": (140, 1480, 4, 5, 9, 1, (4, 4, 4, 4), 1),
    "tiles made again for each panel": (40, 72, 40, 400, 3, 1, (1, 1, 1, 1), 1),
    "columns that no output reads": (6, 17, 12, 12, 3, 2, (0, 0, 0, 0), 1),
    "dilated": (6, 20, 13, 15, 3, 1, (4, 4, 4, 4), 4),
    "more padding than image": (3, 20, 3, 2, 7, 2, (40, 70, 9, 60), 1),
}


def arguments(shape: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    """Return the arguments of `expand_depthwise_squeeze`."""
    inner, channels, height, width, kernel, stride, padding, dilation = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(dtype)

    def norm(prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}norm_weight": draw(channels),
            f"{prefix}norm_bias": draw(channels),
            f"{prefix}norm_mean": draw(channels),
            f"{prefix}norm_var": draw(channels).abs() + 0.5,
        }

    return {
        "x": laid_out(draw(batch, inner, height, width), "sliced"),
        "expand_weight": draw(channels, inner, 1, 1, scale=inner**-0.5),
        "weight": draw(channels, 1, kernel, kernel, scale=1 / kernel),
        **norm("expand_"),
        **norm(""),
        "expand_activation": "silu",
        "activation": "hard_swish",
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
    }


def one_after_the_other(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    first = {name.removeprefix("expand_"): value for name, value in given.items() if name.startswith("expand_")}
    second = {name: value for name, value in given.items() if not name.startswith("expand_") and name != "x"}
    return flat(ops).depthwise_bn_act_squeeze(flat(ops).pointwise_bn_act(given["x"], **first), **second)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_results_are_the_bits_of_the_two_operators(shape: str, isa: str) -> None:
    given = arguments(shape)
    y, pooled = flat(ops).expand_depthwise_squeeze(**given)
    wanted, wanted_pooled = one_after_the_other(given)
    assert torch.equal(y, wanted)
    assert torch.equal(pooled, wanted_pooled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", ["several bands", "several bands, stride 2", "several rows a fill", "dilated"])
def test_threads_do_not_change_the_result(shape: str, dtype: torch.dtype) -> None:
    """Of one or two images: bands and panels are both cut."""
    threads = torch.get_num_threads()
    for batch in (1, 2):
        given = arguments(shape, dtype, batch)
        results = []
        try:
            for count in (1, 2, 3, 7, 16, 64):
                torch.set_num_threads(count)
                results.append(flat(ops).expand_depthwise_squeeze(**given))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_expanded_tensor_is_never_allocated() -> None:
    """A result of 17 MB out of an expanded tensor of 67 MB: the pool maps what the result needs and no more."""
    x = torch.zeros(1, 4, 512, 512).contiguous(memory_format=torch.channels_last)
    given = {"x": x, "expand_weight": torch.ones(64, 4, 1, 1), "weight": torch.ones(64, 1, 3, 3)}
    given |= {"stride": 2, "padding": (1, 1, 1, 1)}
    torch.ops.effkernels.cpu_memory(0)
    torch.ops.effkernels.cpu_memory(1 << 30)
    before = torch.ops.effkernels.cpu_memory(-1)
    y, _ = flat(ops).expand_depthwise_squeeze(**given)
    assert torch.ops.effkernels.cpu_memory(-1) - before < 2 * y.numel() * 4 + (1 << 21)
    two, _ = one_after_the_other(given)
    assert torch.ops.effkernels.cpu_memory(-1) - before > 4 * y.numel() * 4
    assert torch.equal(y, two)

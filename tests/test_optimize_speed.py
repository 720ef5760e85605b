"""What `optimize_` leaves to PyTorch on a CPU: the rule of shapes, held to the measurements in the repository."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from torch import nn

import effkernels
from benchmarks.cpu_ratios import SHAPES, read_table
from effkernels.optimize.speed import is_faster_in_pytorch, widens


def test_nothing_that_is_slower_is_swapped() -> None:
    """By the mean over images, batches, threads and activations, which the rule does not know."""
    ratios = defaultdict(list)
    for row in read_table():
        ratios[(*row[:5], row.dtype)].append(math.log(row.ratio))
    assert {key[:5] for key in ratios} == {(op, *shape) for op, shapes in SHAPES.items() for shape, _ in shapes}
    held = 0
    for (op, in_channels, out_channels, kernel, stride, dtype), logarithms in ratios.items():
        is_dense = op == "conv_bn_act"
        if is_dense and ((widens(in_channels, out_channels) and in_channels > 3) or kernel == 7):
            continue  # whole networks gain: the figures are in speed.py
        mean = math.exp(sum(logarithms) / len(logarithms))
        left = is_dense and is_faster_in_pytorch(in_channels, out_channels, (kernel, kernel))
        what = f"{op} {in_channels} -> {out_channels}, {kernel}x{kernel}, stride {stride}, {dtype}: {mean:.2f}"
        assert mean < 1 if left else mean > 1, what
        held += 1
    assert held >= len(ratios) / 2


@pytest.mark.parametrize(("in_channels", "out_channels", "fused"), [(3, 16, 1), (16, 64, 1), (16, 16, 0), (96, 384, 0)])
def test_the_report_says_what_was_left(in_channels: int, out_channels: int, fused: int) -> None:
    model = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3), nn.BatchNorm2d(out_channels), nn.SiLU()).eval()
    report = effkernels.optimize_(model, input_size=(in_channels, 14, 14))
    assert report.fused == fused
    if not fused:
        assert f"{in_channels} input channels of a 3x3 convolution: PyTorch's is faster" in report.blocks[0].reason

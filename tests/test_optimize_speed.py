"""What `optimize_` leaves to PyTorch on a CPU: the rule of shapes, held to the measurements in the repository."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from optimize_models import PEERS
from torch import nn

import effkernels
from benchmarks import network_ratios
from benchmarks.cpu_ratios import SHAPES, read_table
from effkernels.optimize.speed import is_faster_in_pytorch


def test_nothing_that_is_slower_is_swapped() -> None:
    """By the mean over what the rule does not know: images, batches, threads, activations and dtypes."""
    ratios = defaultdict(list)
    for row in read_table():
        ratios[row[:5]].append(math.log(row.ratio))
    assert set(ratios) == {(op, *shape) for op, shapes in SHAPES.items() for shape, _ in shapes}
    for (op, in_channels, out_channels, kernel, stride), logarithms in ratios.items():
        mean = math.exp(sum(logarithms) / len(logarithms))
        left = op == "conv_bn_act" and is_faster_in_pytorch(in_channels, out_channels, (kernel, kernel))
        what = f"{op} {in_channels} -> {out_channels}, {kernel}x{kernel}, stride {stride}: {mean:.2f}"
        assert mean <= 1.03 if left else mean >= 0.97, what


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "fused"), [(3, 16, 1), (16, 64, 1), (16, 16, 1), (8, 8, 0), (128, 256, 0)]
)
def test_the_report_says_what_was_left(in_channels: int, out_channels: int, fused: int) -> None:
    model = nn.Sequential(nn.Conv2d(in_channels, out_channels, 3), nn.BatchNorm2d(out_channels), nn.SiLU()).eval()
    report = effkernels.optimize_(model, input_size=(in_channels, 14, 14))
    assert report.fused == fused
    if not fused:
        assert f"{in_channels} input channels of a 3x3 convolution: PyTorch's is faster" in report.blocks[0].reason


def test_no_network_is_slower_under_optimize() -> None:
    """The table is measured: `python -m benchmarks.network_ratios`."""
    rows = network_ratios.read_table()
    assert {(row.library, row.name.partition("-")[0]) for row in rows} == {
        (peer.library, peer.name.partition("-")[0]) for peer in PEERS
    }
    assert {row.layout for row in rows} == set(network_ratios.LAYOUTS)
    slower = [f"{row.library} {row.name}, {row.layout}: {row.ratio}" for row in rows if row.ratio < 0.97]
    assert slower == []

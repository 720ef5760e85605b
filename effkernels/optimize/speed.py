"""Which dense convolutions `optimize_` leaves to PyTorch on a CPU because the fused operator would be slower there.

A rule of shapes alone, so that a program depends on neither the size of an image nor a later change of dtype. It is
held to benchmarks/cpu_ratios.csv: times of PyTorch's convolution with norm and activation divided by the operator's
(AMD EPYC, AVX-512, one and two threads, batch 1 and 8, float32 and bfloat16). 1x1 and depthwise convolutions gain
there, so do stems, and dense convolutions that make more channels, as in FusedMBConv. Where a row is level, the fused
form is taken: what is left to PyTorch keeps the blocks around it from handing on channels_last.
"""

from __future__ import annotations

_IMAGE_CHANNELS = 4
# Products for each output value: input channels times kernel area. Mean ratios of the table, float32 / bfloat16, 3x3:
# 24 -> 96 1.23 / 1.19, 96 -> 384 1.11 / 1.06; 8 -> 8 0.94 / 1.06, 16 -> 16 1.00 / 1.11, 64 -> 64 1.02 / 1.05,
# 128 -> 128 0.93 / 0.97; 5x5: 32 -> 32 0.79 / 0.89. Nothing larger was measured.
_MOST_WIDENING = 864
_FEWEST, _MOST = 144, 576
_LARGEST_AREA = 9


def is_faster_in_pytorch(in_channels: int, out_channels: int, kernel: tuple[int, int]) -> bool:
    """Return whether PyTorch computes a dense convolution with what follows it faster than the operator, on a CPU."""
    area = kernel[0] * kernel[1]
    products = in_channels * area
    if area == 1 or in_channels <= _IMAGE_CHANNELS:
        return False
    if out_channels >= 2 * in_channels:
        return products > _MOST_WIDENING
    return area > _LARGEST_AREA or not _FEWEST <= products <= _MOST

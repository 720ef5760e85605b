"""Which dense convolutions `optimize_` leaves to PyTorch on a CPU because the fused operator would be slower there.

A rule of shapes alone, so that a program depends on neither the size of an image nor a later change of dtype. It is
held to benchmarks/cpu_ratios.csv: times of PyTorch's convolution with norm and activation divided by the operator's
(AMD EPYC, AVX-512, one and two threads, batch 1 and 8). 1x1 and depthwise convolutions gain there, and so do dense ones
of the three channels of an image. Others lose: 8 -> 8 channels 0.9, 128 -> 128 0.7 in float32 and 0.4 in bfloat16.
"""

from __future__ import annotations

# Stems are fused whatever their kernel: 7x7 in bfloat16 is 0.9 in the rows, but the blocks after it then convert the
# image themselves. ResNet-18 in bfloat16 on two threads, fused / left: 10.5 / 17.5 ms, batch 8 86 / 122.
_IMAGE_CHANNELS = 4
# Where the channels become several times as many, as in FusedMBConv, the rows lose, too (24 -> 96 in bfloat16 0.7), but
# a network gains: what is left to PyTorch there runs as written, in the memory format of its weights, and the passes of
# norm and activation over the wider tensor count. EfficientNet-ES at 224 on two threads, fused / left, in milliseconds:
# float32, batch 1 17.9 / 26.5, batch 8 144 / 280; bfloat16 11.9 / 17.9, 115 / 146. EfficientNetV2-S takes 76.9 with
# 64 -> 256 fused, 78.7 without. So PyTorch's is taken from so many products for each output value on (input channels
# times kernel area), by how many times as many channels there are.
_FEWEST_PRODUCTS = ((4, 864), (2, 576))  # from 96, from 64 channels of 3x3


def widens(in_channels: int, out_channels: int) -> bool:
    """Return whether a convolution makes so many channels that what follows it decides."""
    return out_channels >= 2 * in_channels


def is_faster_in_pytorch(in_channels: int, out_channels: int, kernel: tuple[int, int]) -> bool:
    """Return whether PyTorch computes a dense convolution with what follows it faster than the operator, on a CPU."""
    if kernel == (1, 1) or in_channels <= _IMAGE_CHANNELS:
        return False
    products = in_channels * kernel[0] * kernel[1]
    return next((products >= fewest for times, fewest in _FEWEST_PRODUCTS if out_channels >= times * in_channels), True)

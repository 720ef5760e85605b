"""A drop-in for slow depthwise layers has to accept bare convolutions, every kernel size, every padding."""

from __future__ import annotations

import copy

import pytest
import torch
from optimize_network import assert_as_before
from peer_models import images, randomise
from torch import Tensor, nn

import effkernels


class Bare(nn.Module):
    """One convolution and nothing else."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Separable(nn.Module):
    """Depthwise and pointwise with nothing between."""

    def __init__(self, inputs: int, outputs: int, kernel: object, **options: object) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, groups=inputs, **options)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


def _normed(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.SiLU())


def _depthwise(channels: int, kernel: object, **options: object) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, groups=channels, **options)


LAYERS = {
    "bare depthwise": lambda: Bare(24, 24, 3, groups=24, bias=False),
    "bare depthwise, 3x1": lambda: Bare(16, 16, (3, 1), groups=16, bias=False),
    "bare depthwise, 3x7": lambda: Bare(24, 24, (3, 7), groups=24),
    "bare pointwise": lambda: Bare(24, 40, 1, bias=False),
    "separable": lambda: Separable(24, 40, 3, padding=1, bias=False),
    "separable, 1x11": lambda: Separable(24, 40, (1, 11), padding=(0, 5)),
    "1x7 with norm": lambda: _normed(_depthwise(24, (1, 7), padding=(0, 3))),
    "11x1 with norm": lambda: _normed(_depthwise(24, (11, 1), padding=(5, 0))),
    "11x11": lambda: _normed(_depthwise(24, 11, padding=5)),
    "13x13": lambda: _normed(_depthwise(24, 13, padding="same")),
    "same, even": lambda: _normed(_depthwise(24, 4, padding="same")),
    "same, dilated": lambda: _normed(_depthwise(24, 5, padding="same", dilation=2)),
    "reflect": lambda: _normed(_depthwise(24, 5, padding=2, padding_mode="reflect")),
    "replicate": lambda: _normed(_depthwise(24, 3, stride=2, padding=(1, 0), padding_mode="replicate")),
    "circular": lambda: _normed(_depthwise(24, 3, padding="same", padding_mode="circular")),
    "reflect, dense": lambda: _normed(nn.Conv2d(24, 96, 3, padding=1, padding_mode="reflect")),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_no_blocks(name: str, channels_last: bool) -> None:
    layer = LAYERS[name]()
    conv = next(module for module in layer.modules() if isinstance(module, nn.Conv2d))
    layer = randomise(nn.Sequential(nn.Conv2d(3, conv.in_channels, 1), layer))[1]
    plain = copy.deepcopy(layer)
    report = effkernels.optimize_(layer, input_size=(conv.in_channels, 21, 23))
    assert report.fused >= 1, str(report)
    assert all(block.fused and not block.reason for block in report.blocks), str(report)
    x = images(2, 21, 23, channels=conv.in_channels)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_as_before(layer, plain, x)
    with torch.no_grad():
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert layer(x).is_contiguous(memory_format=wanted)


def _called(model: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.no_grad():
        model(x)
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bare_convolution_keeps_to_the_faster_way(dtype: torch.dtype) -> None:
    x = images(1, 21, 23, channels=24).to(dtype)
    layer = Bare(24, 24, 3, groups=24).eval().to(dtype)
    effkernels.optimize_(layer)
    assert "aten::conv2d" in _called(layer, x)
    last = x.contiguous(memory_format=torch.channels_last)
    assert ("aten::conv2d" in _called(layer, last)) == (dtype is not torch.float32)


def test_a_bare_convolution_of_few_channels_stays() -> None:
    (block,) = effkernels.optimize_(Bare(8, 8, 3, groups=8).eval()).blocks
    assert not block.fused
    assert "PyTorch's is faster for that few channels" in block.reason

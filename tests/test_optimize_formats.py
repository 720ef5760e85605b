"""Memory formats inside an optimised network: what stays PyTorch's gets the format in which it is faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimize_network import assert_as_before
from peer_models import images, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import effkernels


class Formats(TorchDispatchMode):
    """Records the input of every convolution that PyTorch computes: its shape, and whether it is channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x = args[0]
            self.seen.append((tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)))
        return func(*args, **(kwargs or {}))


def formats(model: nn.Module, x: Tensor) -> list[bool]:
    """Return whether the convolutions that stay PyTorch's get channels_last images, in the order of their calls."""
    with torch.no_grad(), Formats() as record:
        model(x)
    return [channels_last for _, channels_last in record.seen]


def _norm_act(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


def _depthwise(channels: int) -> nn.Sequential:
    return _norm_act(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))


class ConcatenatingBlock(nn.Module):
    """A depthwise convolution that is fused, two dense ones that stay PyTorch's, and their concatenation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.before = _depthwise(channels)
        self.first = _norm_act(nn.Conv2d(channels, channels, 3, padding=1))
        self.second = _norm_act(nn.Conv2d(channels, channels, 3, padding=1))
        self.after = _norm_act(nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        first = self.first(x)
        return self.after(torch.cat([first, self.second(first)], 1))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return randomise(ConcatenatingBlock(128), channels=128)


@pytest.fixture
def optimised(plain: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain)
    report = effkernels.optimize_(model, input_size=(128, 7, 7))
    assert report.fused >= 1, str(report)
    return model


def channels_last_images(side: int) -> Tensor:
    return images(1, side, side, channels=128).contiguous(memory_format=torch.channels_last)


def test_many_weights_for_few_pixels_keep_their_own_format(plain: nn.Module, optimised: nn.Module) -> None:
    x = images(1, 7, 7, channels=128)
    assert formats(optimised, x) == [False, False]
    assert_as_before(optimised, plain, x)


def test_few_weights_for_many_pixels_get_the_format_of_their_neighbours(plain: nn.Module, optimised: nn.Module) -> None:
    x = images(1, 28, 28, channels=128)
    assert formats(optimised, x) == [True, True]
    assert_as_before(optimised, plain, x)


@pytest.mark.parametrize("side", [7, 28])
def test_the_batch_counts_as_the_pixels_do(optimised: nn.Module, side: int) -> None:
    assert formats(optimised, images(16, side, side, channels=128)) == [True, True]


@pytest.mark.parametrize("side", [7, 28])
def test_the_result_has_the_format_of_the_input(plain: nn.Module, optimised: nn.Module, side: int) -> None:
    x = channels_last_images(side)
    assert_as_before(optimised, plain, x)
    with torch.no_grad():
        assert optimised(x).is_contiguous(memory_format=torch.channels_last)
        assert optimised(x.contiguous()).is_contiguous()


@pytest.mark.parametrize("side", [7, 28])
def test_weights_in_channels_last_get_images_in_channels_last(optimised: nn.Module, side: int) -> None:
    optimised.to(memory_format=torch.channels_last)
    assert formats(optimised, channels_last_images(side)) == [True, True]


def test_one_graph_for_all_sizes(plain: nn.Module, optimised: nn.Module) -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(optimised, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for side in (7, 9, 28):
            x = images(2, side, side, channels=128)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
    assert graphs == 1


class Opaque(nn.Module):
    """A forward that cannot be traced, around a dense convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)) if bool(x.sum() > -1e30) else x


class Around(nn.Module):
    """An inner module that gets channels_last tensors from the fused one in front of it, and an opaque one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _norm_act(nn.Conv2d(3, 16, 3, 2, 1))
        self.stages = nn.Sequential(_depthwise(16), _depthwise(16), Opaque(16), _depthwise(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


def test_a_module_that_runs_as_written_gets_what_the_plain_network_would_give_it() -> None:
    plain = randomise(Around())
    model = copy.deepcopy(plain)
    effkernels.optimize_(model, input_size=32)
    x = images(2, 32, 32)
    assert formats(model, x) == [False]
    assert_as_before(model, plain, x)
    last = x.contiguous(memory_format=torch.channels_last)
    for one in (model, plain):
        one.to(memory_format=torch.channels_last)
    assert formats(model, last) == [True]
    assert_as_before(model, plain, last)
    with torch.no_grad():
        assert model(last).is_contiguous(memory_format=torch.channels_last)


def test_a_lone_1x1_convolution_is_not_worth_two_changes_of_format() -> None:
    plain = randomise(_norm_act(nn.Conv2d(64, 64, 1)), channels=64)
    model = copy.deepcopy(plain)
    assert effkernels.optimize_(model, input_size=(64, 14, 14)).fused == 1
    x = images(1, 14, 14, channels=64)
    assert len(formats(model, x)) == 1
    assert formats(model, x.contiguous(memory_format=torch.channels_last)) == []
    assert_as_before(model, plain, x)


def test_a_block_with_little_to_gain_is_left_and_the_reason_told() -> None:
    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128))
            self.small = nn.Sequential(nn.Conv2d(128, 128, 1), nn.BatchNorm2d(128))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.large(x) + self.small(x))

    report = effkernels.optimize_(randomise(TwoBranches(), channels=128), input_size=(128, 8, 8))
    (block,) = report.blocks
    assert not block.fused
    assert "too little to gain" in block.reason
    assert "PyTorch's is faster there" in block.reason

"""A block and a network as anybody might write them, for the tests of `optimize_`."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from parity import assert_parity
from torch import Tensor, nn


class Excite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Block(nn.Module):
    """An inverted bottleneck as anybody might write it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.expand, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act = nn.SiLU(inplace=True)
        self.se = Excite(hidden)
        self.project, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.expand(x)))
        y = self.bn3(self.project(self.se(self.act(self.bn2(self.depthwise(y))))))
        return x + y if self.skip else y


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, 2), Block(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def programs(module: nn.Module) -> list[nn.Module]:
    return [one for one in module.modules() if "_effkernels_programs" in one.__dict__]


def is_fused(module: nn.Module, x: Tensor) -> bool:
    """Return whether a call of an optimised module with `x` would run its program."""
    (program,) = module._effkernels_programs.values()
    return not module.training and program.run(module, x) is not None


def assert_as_before(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        others = [plain(x), plain(x.contiguous(memory_format=torch.channels_last))]
        assert_parity(model(x), others, copy.deepcopy(plain).double()(x.double()))

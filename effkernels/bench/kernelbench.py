"""The problems of KernelBench (ScalingIntelligence/KernelBench) about depthwise and MBConv layers, by their shapes.

Level 1, problems 82 to 87, are bare convolutions; level 3, problems 19 to 24, networks that it calls MobileNet, MBConv
and EfficientNet, some of which are not those of the papers. Here they are in eval mode, with random statistics of the
norms. The times that KernelBench publishes were measured on an H100 with models in training mode, whose norms take the
statistics of the batch; they are shown only beside rows that a GPU measured.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import effkernels
from effkernels.bench.block_cases import measure_block
from effkernels.bench.least_work import least_work
from effkernels.bench.measure import Options, Refusal
from effkernels.bench.op_cases import dtype_name
from effkernels.bench.samples import draw_weights_, norms_of
from effkernels.bench.timing import Row

CONTENDERS = {
    "effkernels": "the problem after optimize_",
    "eager": "the problem in plain PyTorch, channels_last",
    "eager-nchw": "the same in NCHW, as KernelBench runs it",
    "compile": "the problem under torch.compile, channels_last",
}
HARDWARE = "NVIDIA H100 80GB HBM3"
# Copies of input and result that all contenders together need at a time, with what PyTorch keeps in between.
_INPUTS, _RESULTS = 4, 4


# ----------------------------------------------------------------------------------------------------- the layers


def _conv(into: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (rows // 2, columns // 2)
    return nn.Conv2d(into, out, kernel, stride=stride, padding=padding, groups=groups, bias=False)


def _bare(into: int, out: int, kernel: int | tuple[int, int], *, groups: int = 1, padding: int = 0) -> nn.Module:
    return nn.Sequential(nn.Conv2d(into, out, kernel, padding=padding, groups=groups, bias=False))


def _normed(conv: nn.Conv2d, activation: type[nn.Module] | None) -> list[nn.Module]:
    """Return a convolution, its norm and its activation."""
    return [conv, nn.BatchNorm2d(conv.out_channels), *([activation()] if activation is not None else [])]


class _Residual(nn.Sequential):
    """Layers whose input is added to their result."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x  # type: ignore[no-any-return, no-untyped-call]


def _inverted(
    into: int, out: int, kernel: int, stride: int, expansion: int, activation: type[nn.Module], *,
    residual: bool = False, expands: bool = True, squeezes: bool = False,
) -> nn.Module:  # fmt: skip
    """Return an inverted bottleneck.

    Args:
        residual: add the input where the shapes allow it.
        expands: there is a first convolution even if it makes no more channels.
        squeezes: the depthwise result is pooled and goes on as what squeeze-and-excitation makes of it, a value for
            each channel.
    """
    hidden = into * expansion
    layers = _normed(_conv(into, hidden, 1), activation) if expands else []
    layers += _normed(_conv(hidden, hidden, kernel, stride=stride, groups=hidden), activation)
    if squeezes:
        layers += [nn.AdaptiveAvgPool2d(1), _conv(hidden, hidden // 4, 1), activation()]
        layers += [_conv(hidden // 4, hidden, 1), nn.Sigmoid()]
    layers += _normed(_conv(hidden, out, 1), None)
    return (_Residual if residual and stride == 1 and into == out else nn.Sequential)(*layers)


def _network(stem: list[nn.Module], blocks: Sequence[nn.Module], head: list[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(*stem, *blocks, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def _mobilenet_v1() -> nn.Module:
    widths = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    blocks: list[nn.Module] = []
    for into, out, stride in zip(widths, widths[1:], strides, strict=False):
        blocks += _normed(_conv(into, into, 3, stride=stride, groups=into), nn.ReLU)
        blocks += _normed(_conv(into, out, 1), nn.ReLU)
    return _network(_normed(_conv(3, 32, 3, stride=2), nn.ReLU), blocks, [], 1024)


def _mobilenet_v2() -> nn.Module:
    """Return it without residual connections, which the problem leaves out."""
    blocks, into = [], 32
    for expansion, out, count, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            stride = first if number == 0 else 1
            blocks.append(_inverted(into, out, 3, stride, expansion, nn.ReLU6, expands=expansion > 1))
            into = out
    head = _normed(_conv(320, 1280, 1), nn.ReLU6)
    return _network(_normed(_conv(3, 32, 3, stride=2), nn.ReLU6), blocks, head, 1280)


def _b0() -> nn.Module:
    blocks, into = [], 32
    for out, kernel, stride, expansion in (
        (16, 3, 1, 1), (24, 3, 2, 6), (24, 3, 1, 6), (40, 5, 2, 6), (40, 5, 1, 6), (80, 3, 2, 6), (80, 3, 1, 6),
        (112, 5, 1, 6), (112, 5, 1, 6), (192, 5, 2, 6), (192, 5, 1, 6), (192, 5, 1, 6), (320, 3, 1, 6),
    ):  # fmt: skip
        blocks.append(
            _inverted(into, out, kernel, stride, expansion, nn.ReLU6, residual=True, expands=expansion > 1)
        )  # fmt: skip
        into = out
    head = _normed(_conv(320, 1280, 1), nn.ReLU)
    return _network(_normed(_conv(3, 32, 3, stride=2), nn.ReLU), blocks, head, 1280)


def _b1() -> nn.Module:
    blocks, into = [], 32
    for out, stride, expansion in (
        (16, 1, 1), (24, 2, 6), (40, 2, 6), (80, 2, 6), (112, 1, 6), (192, 2, 6), (320, 1, 6),
    ):  # fmt: skip
        blocks.append(_inverted(into, out, 3, stride, expansion, nn.ReLU6))
        into = out
    head = _normed(_conv(320, 1280, 1), nn.ReLU)
    return _network(_normed(_conv(3, 32, 3, stride=2), nn.ReLU), blocks, head, 1280)


def _b2() -> nn.Module:
    blocks, into = [], 32
    for out, stride, expansion in ((96, 1, 3), (144, 2, 6), (192, 2, 6), (288, 2, 6), (384, 1, 6)):
        blocks.append(_inverted(into, out, 3, stride, expansion, nn.ReLU, squeezes=True))
        into = out
    head = _normed(_conv(384, 1408, 1), nn.ReLU)
    return _network(_normed(_conv(3, 32, 3, stride=2), nn.ReLU), blocks, head, 1408)


# --------------------------------------------------------------------------------------------------- the problems


@dataclass(frozen=True)
class Problem:
    """A problem.

    Attributes:
        level, number: of KernelBench.
        title: what it is.
        batch: images of its input.
        shape: (C, H, W) of an image.
        build: makes the module.
        eager_ms, compile_ms: published times of `HARDWARE` in float32, mean of 100 calls.
    """

    level: int
    number: int
    title: str
    batch: int
    shape: tuple[int, int, int]
    build: Callable[[], nn.Module]
    eager_ms: float
    compile_ms: float

    def case(self, batch: int) -> str:
        """Return the case as rows name it."""
        return f"KernelBench {self.level}.{self.number} {self.title} {batch}x{'x'.join(map(str, self.shape))}"

    def least_work(self, batch: int, dtype: torch.dtype) -> tuple[int, int]:
        """Return the bytes and the FLOPs that no version of the problem can avoid, see `least_work`."""
        with torch.inference_mode():
            out = self.plain().to("meta")(torch.empty(batch, *self.shape, device="meta")).shape
        return least_work(self.plain(), (batch, *self.shape), tuple(out), dtype)

    def plain(self) -> nn.Module:
        """Return the module in eval mode, float32 on the CPU."""
        return copy.deepcopy(_built(self))

    def fused(self) -> nn.Module:
        """Return the module after `optimize_`, float32 on the CPU.

        Raises:
            ValueError: nothing of it runs fused.
        """
        module = self.plain()
        if not effkernels.optimize_(module, input_size=self.shape).fused:
            raise ValueError("nothing of this problem runs fused")
        return module

    def images(self, batch: int) -> Tensor:
        """Return inputs between 0 and 1, float32 on the CPU, channels_last."""
        drawn = torch.rand(batch, *self.shape, generator=torch.Generator().manual_seed(0))
        return drawn.contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=1)
def _built(problem: Problem) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        module = problem.build().eval()
        if norms_of(module):
            draw_weights_(module, problem.shape[0], problem.shape[1])
    return module


PROBLEMS = (
    Problem(1, 82, "depthwise 3x3", 16, (64, 512, 512), lambda: _bare(64, 64, 3, groups=64), 2.55, 2.48),
    Problem(1, 83, "depthwise 3x1", 64, (8, 512, 512), lambda: _bare(8, 8, (3, 1), groups=8), 1.53, 7.63),
    Problem(1, 84, "depthwise 3x3", 64, (128, 256, 512), lambda: _bare(128, 128, 3, groups=128), 10.1, 9.83),
    Problem(1, 85, "depthwise 3x7", 32, (128, 128, 256), lambda: _bare(128, 128, (3, 7), groups=128), 2.27, 13.8),
    Problem(
        1, 86, "depthwise separable", 16, (64, 512, 512),
        lambda: nn.Sequential(_bare(64, 64, 3, groups=64, padding=1), _bare(64, 128, 1)), 3.91, 4.18,
    ),
    Problem(1, 87, "pointwise", 16, (64, 1024, 1024), lambda: _bare(64, 128, 1), 4.66, 13.3),
    Problem(3, 19, "MobileNetV1", 10, (3, 224, 224), _mobilenet_v1, 1.73, 1.81),
    Problem(3, 20, "MobileNetV2", 10, (3, 224, 224), _mobilenet_v2, 3.56, 3.20),
    Problem(
        3, 21, "MBConv", 10, (112, 224, 224), lambda: _inverted(112, 192, 5, 2, 6, nn.ReLU6, residual=True), 5.43, 3.62
    ),
    Problem(3, 22, "EfficientNetB0", 10, (3, 224, 224), _b0, 3.03, 3.21),
    Problem(3, 23, "EfficientNetB1", 10, (3, 240, 240), _b1, 1.62, 2.19),
    Problem(3, 24, "EfficientNetB2", 2, (3, 224, 224), _b2, 1.64, 1.66),
)  # fmt: skip


def published(case: str) -> tuple[float, float] | None:
    """Return the published eager and compiled milliseconds of a case in float32; None: it is no problem's own."""
    return next(
        ((problem.eager_ms, problem.compile_ms) for problem in PROBLEMS if problem.case(problem.batch) == case), None
    )


def bytes_needed(problem: Problem, batch: int, dtype: torch.dtype) -> int:
    """Return about how much memory a measurement takes, all contenders together."""
    moved, _ = problem.least_work(batch, dtype)
    images = batch * math.prod(problem.shape) * dtype.itemsize
    return _INPUTS * images + _RESULTS * max(0, moved - images)


def _bytes_free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def measure_problem(
    problem: Problem,
    batch: int,
    dtype: torch.dtype,
    contenders: Sequence[str],
    device: torch.device,
    options: Options,
    *,
    threads: int,
    date: str,
    advance: Callable[[str], None] = lambda step: None,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], list[Refusal]]:
    """Measure a problem; arguments and results as of `op_cases.measure_op`."""
    needed, free = bytes_needed(problem, batch, dtype), _bytes_free(device)
    if free is not None and needed > free:
        reason = f"needs about {needed / 1e9:.1f} GB of memory in {dtype_name(dtype)}, and {free / 1e9:.1f} GB are free"
        for name in contenders:
            for _ in range(options.rounds):
                advance(name)
        return [], [Refusal(name, problem.case(batch), reason) for name in contenders]
    return measure_block(
        problem, batch, dtype, contenders, device, options, threads=threads, date=date, advance=advance, report=report,
        suite="kernelbench",
    )  # fmt: skip

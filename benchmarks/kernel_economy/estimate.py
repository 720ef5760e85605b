"""Counted bytes and instruction slots of a few calls of EfficientNet-B0 against an H200's limits.

An estimate from first principles, not a measurement: every unit at its peak rate, perfect overlap. What it shows is
which limit a kernel meets first, and how far the others are. Plans come from the library (cuda_plan), registers from
the disassembly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.kernel_economy.reading import Kernel

# An H200: multiprocessors, clock, and the copy bandwidth and bf16 matrix rate that were measured on one (2026-10).
_MULTIPROCESSORS = 132
_CLOCK = 1.98e9
_COPY_BYTES = 4.3e12
_MATRIX_FLOPS = 0.79e15
# Results per clock and multiprocessor at compute capability 9.0 (CUDA C++ Programming Guide, arithmetic instructions).
_FMA, _SPECIAL, _INTEGER = 128, 16, 64
_LIMITS = (90, 132, 233472, 232448, 2048, 32, 65536, 16)
_BATCH = 256


@dataclass(frozen=True)
class Representative:
    """One call in bfloat16 at batch 256, as `cuda_plan` takes it.

    Attributes:
        arguments: template arguments of the kernel that the plan names.
        elements: of the result.
        moved: bytes that have to be read and written.
        fma, conversions: instructions per element of the result, outside of the tensor cores.
        special: special-function instructions per element.
        flops: of the matrix product.
    """

    op: str
    words: str
    shape: tuple[int, ...]
    elements: int
    moved: int
    fma: float
    conversions: float
    special: float
    flops: float = 0.0


def depthwise(op: str, channels: int, plane: int, kernel: int, stride: int, reduced: int) -> Representative:
    """A depthwise operator: K * K multiply-adds, one for the norm, one sum; inputs under a strip are converted once."""
    out = plane // stride
    elements = _BATCH * channels * out * out
    strip = 4 if kernel >= 7 or stride > 1 else 7
    inputs = ((strip - 1) * stride + kernel) * kernel / strip
    half = kernel // 2
    shape = (_BATCH, channels, plane, plane, kernel, kernel, stride, 1, half, half, half, half, reduced)
    moved = 2 * (_BATCH * channels * plane * plane + elements)
    words = f"{channels}x{plane}x{plane} {kernel}x{kernel} stride {stride}"
    return Representative(op, words, shape, elements, moved, kernel * kernel + 4, inputs + 0.5, 1)


def pointwise(channels: int, plane: int, out: int, gated: bool, residual: bool) -> Representative:
    """Return a pointwise operator: the product on the tensor cores, norm, activation and residual per element."""
    pixels = _BATCH * plane * plane
    moved = 2 * pixels * (channels + out * (2 if residual else 1))
    words = f"{channels}x{plane}x{plane} to {out}" + ", gate" * gated + ", residual" * residual
    shape = (_BATCH, plane, plane, channels, out, int(gated), int(residual), 0)
    special = 0 if gated else 1
    fma = 1 + 2 * special + residual
    return Representative(
        "pointwise_bn_act", words, shape, pixels * out, moved, fma, 0.5, special, 2.0 * pixels * channels * out
    )


CALLS = (
    depthwise("depthwise_bn_act_squeeze", 96, 112, 3, 2, 0),
    depthwise("depthwise_bn_act_gate", 144, 56, 3, 1, 6),
    depthwise("depthwise_bn_act_gate", 240, 28, 5, 1, 10),
    depthwise("depthwise_bn_act_gate", 672, 14, 5, 1, 28),
    depthwise("depthwise_bn_act_se", 672, 14, 5, 1, 28),
    depthwise("depthwise_bn_act_gate", 1152, 7, 5, 1, 48),
    pointwise(16, 112, 96, False, False),
    pointwise(144, 56, 24, True, True),
    pointwise(192, 7, 1152, False, False),
    pointwise(1152, 7, 192, True, True),
)


def planned(call: Representative) -> list[dict[str, str]]:
    """Return the launches of a call on an H200, as key and value."""
    text = torch.ops.effkernels.cuda_plan(call.op, "bfloat16", list(call.shape), list(_LIMITS))
    return [dict(word.split("=", 1) for word in line.split()) for line in text.splitlines()]


def microseconds(call: Representative) -> dict[str, float]:
    """Return the time that each of a call's needs takes at an H200's full rate."""
    clocks = _MULTIPROCESSORS * _CLOCK
    return {
        "memory": call.moved / _COPY_BYTES * 1e6,
        "FMA": call.elements * call.fma / (_FMA * clocks) * 1e6,
        "conversion": call.elements * call.conversions / (_INTEGER * clocks) * 1e6,
        "special": call.elements * call.special / (_SPECIAL * clocks) * 1e6,
        "tensor": call.flops / _MATRIX_FLOPS * 1e6,
    }


def resident(kernels: Sequence[Kernel], launch: dict[str, str], call: Representative) -> str:
    """Blocks of a launch on a multiprocessor, from registers and shared memory: "3 x 128 threads"."""
    threads = 1
    for side in launch["block"].split(","):
        threads *= int(side)
    wanted = [k for k in kernels if k.arch == 90 and k.family == launch["kernel"] and "bfloat16" in k.arguments]
    if call.op.startswith("depthwise"):
        wanted = [k for k in wanted if k.arguments[1:3] == tuple(map(str, call.shape[4:6]))] or wanted
    else:
        wanted = [k for k in wanted if k.max_threads == threads and k.arguments[-1] == "false"]
    if not wanted:
        return ""
    counts = {kernel.resident_blocks(threads, int(launch["shared"])) for kernel in wanted}
    # Several tiles of one size: the plan does not say which, so all are listed.
    return f"{' or '.join(map(str, sorted(counts)))} x {threads}"


def table(kernels: Sequence[Kernel]) -> list[str]:
    """Return the lines of the estimate's table, in Markdown."""
    columns = ["memory", "FMA", "conversion", "special", "tensor"]
    lines = [
        "| call | kernel | grid | blocks x threads | bytes / element | FMA | special | "
        + " | ".join(f"{name} us" for name in columns)
        + " |",
        "|---|---|--:|--:|--:|--:|--:|" + "--:|" * len(columns),
    ]
    for call in CALLS:
        launches = planned(call)
        times = microseconds(call)
        longest = max(times, key=lambda name: times[name])
        cells = [f"**{times[name]:.0f}**" if name == longest else f"{times[name]:.0f}" for name in columns]
        kernel = " + ".join(launch["kernel"] for launch in launches)
        grid = " + ".join(launch["grid"] for launch in launches)
        lines.append(
            f"| {call.op} {call.words} | {kernel} | {grid} | {resident(kernels, launches[0], call)} "
            f"| {call.moved / call.elements:.1f} | {call.fma:g} | {call.special:g} | {' | '.join(cells)} |"
        )
    return lines

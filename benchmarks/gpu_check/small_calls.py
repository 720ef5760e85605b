"""Calls every operator on small shapes and compares with PyTorch: the program that compute-sanitizer watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

import effkernels
from effkernels import ops
from effkernels.bench.op_case import (
    DEPTHWISE_OPS,
    OpCase,
    conv_case,
    depthwise_case,
    expand_case,
    gate_case,
    pointwise_case,
)
from effkernels.ops import reference
from effkernels.ops.backends import OPERATORS
from effkernels.ops.parity import full_float32, judge


def small_cases() -> Iterator[OpCase]:
    """Return every operator at shapes with full vectors and at odd ones: both ways of every plan, few thread blocks."""
    for channels, height, width, kernel, stride in ((32, 9, 10, 3, 1), (40, 7, 9, 5, 2), (7, 5, 6, 3, 2)):
        for op in DEPTHWISE_OPS:
            yield depthwise_case(op, (2, channels, height, width), kernel, stride)
        yield gate_case(2, channels)
        yield pointwise_case((2, channels, height, width), 24, activation="silu")
        yield pointwise_case((2, channels, height, width), channels, gate=True, residual=True)
    yield expand_case((2, 16, 9, 10), 40, 3, 1)
    yield expand_case((2, 7, 5, 6), 12, 5, 2)
    yield conv_case((2, 3, 17, 19), 32)
    yield conv_case((1, 8, 7, 7), 12)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls on a device (default: cuda); exit status 1 where a result is wrong."""
    device = torch.device((sys.argv[1:] if arguments is None else arguments or ["cuda"])[0])
    cpu = torch.device("cpu")
    full_float32()  # the yardsticks are the CPU's, which has no TF32
    wrong, done = [], set()
    with torch.inference_mode(), effkernels.backend(device.type):
        for case in small_cases():
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                rounded = case.rounded(dtype)
                results = rounded.prepare(ops, dtype, device)()
                # On the CPU, so that the tool has no kernels but ours to watch.
                plain = rounded.prepare(reference, dtype, cpu)()
                truth = rounded.prepare(reference, torch.float64, cpu)()
                ok, error, limit = judge(results, plain, truth)
                done.add(case.op)
                if not ok:
                    wrong.append(f"{case.op} {case.shape} {dtype}: error {error:.1e}, limit {limit:.1e}")
    for line in wrong:
        print(line)
    missing = set(OPERATORS) - done
    print(f"{len(done)} operators called, {len(wrong)} wrong results")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())

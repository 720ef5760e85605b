"""Calls every operator on small shapes and compares with PyTorch: the program that compute-sanitizer watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

import effkernels
from effkernels import ops
from effkernels.ops import reference
from effkernels.ops.backends import OPERATORS
from effkernels.ops.call import DEPTHWISE_OPS, OpCall, in_float64, run
from effkernels.ops.parity import full_float32, judge


def small_calls() -> Iterator[OpCall]:
    """Return every operator at shapes with full vectors and at odd ones: both ways of every plan, few thread blocks."""
    for shape, kernel, stride in (((2, 32, 9, 10), 3, 1), ((2, 40, 7, 9), 5, 2), ((2, 7, 5, 6), 3, 2)):
        for op in DEPTHWISE_OPS:
            yield OpCall.on(op, shape, kernel, stride=stride)
        yield OpCall.on("squeeze_excite_gate", shape[:2])
        yield OpCall.on("pointwise_bn_act", shape, out_channels=24)
        yield OpCall.on(
            "pointwise_bn_act", shape, out_channels=shape[1], activation="identity", gated=True, residual=True
        )
        yield OpCall.on("pointwise_bn_act_pool", shape, out_channels=72)
    yield OpCall.on("pointwise_bn_act_pool", (1, 24, 41, 40), out_channels=24)  # several blocks share an image
    yield OpCall.on("expand_depthwise_squeeze", (2, 16, 9, 10), out_channels=40)
    yield OpCall.on("expand_depthwise_squeeze", (2, 7, 5, 6), 5, out_channels=12, stride=2)
    yield OpCall.on("mbconv", (2, 16, 7, 8), out_channels=16, residual=True)
    yield OpCall.on("mbconv", (3, 24, 45, 50), out_channels=24, residual=True)  # no cluster holds it
    yield OpCall.on("mbconv", (2, 7, 5, 6), 5, out_channels=12, stride=2)
    yield OpCall.on("mbconv", (2, 40, 23, 20), expanded=0, out_channels=16)
    yield OpCall.on("mbconv", (2, 32, 9, 8), 5, expanded=0, out_channels=16)
    yield OpCall.on("conv_bn_act", (2, 3, 17, 19), out_channels=32, stride=2)
    yield OpCall.on("conv_bn_act", (1, 8, 7, 7), out_channels=12, stride=2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls on a device (default: cuda); exit status 1 where a result is wrong."""
    device = torch.device((sys.argv[1:] if arguments is None else arguments or ["cuda"])[0])
    full_float32()  # the yardsticks are the CPU's, which has no TF32
    wrong, done = [], set()
    with torch.inference_mode(), effkernels.backend(device.type):
        for call in small_calls():
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                results = run(ops, call.op, call.arguments(dtype, device))
                # On the CPU, so that the tool has no kernels but ours to watch.
                arguments = call.arguments(dtype)
                plain = run(reference, call.op, arguments)
                truth = run(reference, call.op, in_float64(arguments))
                ok, error, limit = judge(results, plain, truth)
                done.add(call.op)
                if not ok:
                    wrong.append(f"{call} {dtype}: error {error:.1e}, limit {limit:.1e}")
    for line in wrong:
        print(line)
    missing = set(OPERATORS) - done
    print(f"{len(done)} operators called, {len(wrong)} wrong results")
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compiles what `effkernels tune` may choose from, and prints what is wrong: python -m triton_gates.candidates 80.
With a second number, 3, it compiles every third candidate.

A process of its own, as worker.py is. A candidate that spills or does not fit would never be chosen on the GPU where it
was timed; it would only cost its user the time to find that out.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton_gates import rules, worker
from triton_gates.calls import FLOAT32, CompiledCall

from effkernels.triton import _launch, tuned_plan

CALLS = (
    CompiledCall.on(
        "pointwise_bn_act", (256, 480, 14, 14), out_channels=80, gated=True, residual=True, activation="identity"
    ),
    CompiledCall.on("pointwise_bn_act", (256, 40, 28, 28), out_channels=240, dtype=FLOAT32),
    CompiledCall.on("depthwise_bn_act", (256, 240, 28, 28), 5, weight=FLOAT32),
    CompiledCall.on("depthwise_bn_act_squeeze", (256, 144, 56, 56), 5, stride=2, weight=FLOAT32),
    CompiledCall.on("conv_bn_act", (256, 3, 224, 224), out_channels=32, stride=2),
    CompiledCall.on("conv_bn_act", (256, 3, 380, 380), 5, out_channels=48, stride=2, dtype=FLOAT32),
)


def look_up(call: CompiledCall) -> tuned_plan.Lookup:
    """Return the question that a call asks the tuned plan."""
    asked: list[tuned_plan.Lookup] = []
    _launch.run = lambda *arguments, **options: None
    with tuned_plan.answering(lambda lookup: asked.append(lookup)):
        worker.launch(worker.operators()[call.op], call)
    (only,) = asked
    return only


def main(arch: int, every: int = 1) -> None:
    driver.set_active(worker.Absent(GPUTarget("cuda", arch, 32)))
    pointwise = importlib.import_module("effkernels.triton.pointwise")
    pointwise.multiprocessors = lambda device: rules.MULTIPROCESSORS[arch]
    count = 0
    for call in CALLS:
        for candidate in look_up(call).candidates[::every]:
            count += 1

            def judge(compiled: Any, name: str, call: CompiledCall, seconds: float, candidate: Any = candidate) -> None:
                kernel = worker.read(compiled, name, call, arch, seconds)
                for rule in (rules.in_registers, rules.shared_fits, rules.short_code):
                    message = rule(kernel)
                    if message:
                        print(f"{kernel}: {candidate}: {message}")

            with tuned_plan.answering(lambda lookup, candidate=candidate: candidate):
                worker.compile_calls([call], rules.MULTIPROCESSORS[arch], arch // 10, judge)
    print(f"{count} candidates compiled")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))

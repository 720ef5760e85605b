"""Part `launches`: what the profiler sees of one call of each operator. A fill counts as a launch.

The profiler's account and this project's own count have to agree, for the compiled kernels and for Triton's, and
operators that promise one launch must have one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import effkernels
from benchmarks.gpu_check.common import NotAvailable, Options, run_part
from benchmarks.gpu_check.measure import launch_count
from effkernels import ops
from effkernels.bench.op_timing import triton_launches
from effkernels.ops import backends
from effkernels.ops.call import DEPTHWISE_OPS, OpCall, prepared

# Operators that take one launch at every size; depthwise_bn_act_se and expand_depthwise_squeeze take one or two, and
# mbconv one or three, as their plans say.
ONE_LAUNCH = ("depthwise_bn_act", "depthwise_bn_act_squeeze", "depthwise_bn_act_gate", "squeeze_excite_gate",
              "pointwise_bn_act", "pointwise_bn_act_pool", "conv_bn_act")  # fmt: skip


def cases() -> list[OpCall]:
    """Return each operator at an early and at a late shape of EfficientNet-B0."""
    found = []
    for channels, plane, kernel, stride, reduced in ((96, 112, 3, 2, 4), (672, 14, 5, 1, 28)):
        for op in DEPTHWISE_OPS:
            found.append(OpCall.on(op, (4, channels, plane, plane), kernel, stride=stride, reduced=reduced))
        found.append(OpCall.on("squeeze_excite_gate", (4, channels), reduced=reduced))
    found.append(OpCall.on("pointwise_bn_act", (4, 96, 56, 56), out_channels=24, activation="identity", gated=True))
    found.append(OpCall.on("pointwise_bn_act", (4, 192, 7, 7), out_channels=1152))
    found.append(OpCall.on("pointwise_bn_act_pool", (4, 320, 7, 7), out_channels=1280))
    found.append(OpCall.on("expand_depthwise_squeeze", (4, 24, 56, 56), out_channels=144))
    found.append(OpCall.on("mbconv", (4, 112, 14, 14), 5, out_channels=112, residual=True))
    found.append(OpCall.on("mbconv", (4, 24, 56, 56), out_channels=24, residual=True))
    found.append(OpCall.on("mbconv", (4, 32, 112, 112), expanded=0, out_channels=16))
    found.append(OpCall.on("conv_bn_act", (4, 3, 224, 224), out_channels=32, stride=2))
    return found


def device_events(events: Sequence[Any]) -> list[str]:
    """Return names of the kernels, fills and copies among a profile's events."""
    return [
        event.name
        for event in events
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]


def operator_events(events: Sequence[Any]) -> list[str]:
    """Names of this library's operators among a profile's events: what a dry run has in the place of launches."""
    return [event.name for event in events if event.name.startswith("effkernels::")]


def profiled(call: Callable[[], object], device: torch.device) -> list[str]:
    """Return what one call launches on the GPU, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    call()
    wait()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        call()
        wait()
    events = profiler.events() or []
    return device_events(events) if on_gpu else operator_events(events)


def complaint(op: str, seen: Sequence[str], counted: int | None) -> str | None:
    """Return what is wrong with the launches of one call, in one line; None if nothing is."""
    if counted is not None and counted != len(seen):
        return f"the profiler sees {len(seen)} launches, {counted} were counted: {', '.join(seen)}"
    if op in ONE_LAUNCH and len(seen) != 1:
        return f"{len(seen)} launches where one is promised: {', '.join(seen)}"
    if not 1 <= len(seen) <= 2:
        return f"{len(seen)} launches: {', '.join(seen)}"
    return None


def call_on(backend: str, case: OpCall, device: torch.device) -> tuple[int | None, list[str]]:
    """Launches of one call by this project's own count (None without one), and what the profiler sees of one."""
    with torch.inference_mode(), effkernels.backend(backend):
        call = prepared(ops, case.op, case.arguments(torch.bfloat16, device))
        call()
        before = launch_count()
        with triton_launches() as names:
            call()
        counted = len(names) if backend == "triton" else None if before is None else (launch_count() or 0) - before
        return counted, profiled(call, device)


def launches(options: Options) -> str:
    """Launches of one call of each operator."""
    options.needs_gpu()
    device = torch.device(options.device)
    if device.type == "cuda" and not profiled(torch.empty(1 << 20, device=device).zero_, device):
        raise NotAvailable("torch.profiler sees no GPU activity here")
    can_run = {"cuda": backends.can_run_cuda, "triton": backends.can_run_triton}
    if options.dry:
        can_run = {"cpu": backends.can_run_cpu}
    calls = {
        f"{case} by {backend}": (backend, case)
        for backend, decide in can_run.items()
        for case in cases()
        if decide(case.op, device=device, dtype=torch.bfloat16).ok
    }
    assert calls, "no backend of this package runs an operator here"
    work = options.work("launches")
    for step, (backend, case) in work.steps(calls, lambda call: 0.5):
        counted, seen = call_on(backend, case, device)
        print(f"{step:<80} {len(seen)}  {', '.join(name[:60] for name in seen)}", flush=True)
        problem = complaint(case.op, seen, counted)
        if problem:
            work.wrong(step, f"{step}: {problem}")
    return work.end(f"{len(calls)} calls, each with the launches that it promises")


if __name__ == "__main__":
    sys.exit(run_part(launches))

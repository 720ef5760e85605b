"""``effkernels info``: what is installed, and what can run here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

import effkernels
from effkernels import _library, environment
from effkernels.commands.common import add_json, why_no_gpu
from effkernels.ops import backends
from effkernels.triton import MOST_SCALED_ALONE, tuned_plan

TEXT = "Show version, build, devices, and which backend can run which operator."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    add_json(parser)


def _cpu_isa() -> str | None:
    """Return the instruction set that the CPU kernels use in this process."""
    return str(torch.ops.effkernels.cpu_isa("")) if _library.is_loaded() else None


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": environment.cpu_model(),
            "threads": torch.get_num_threads(),
            "features": environment.cpu_features(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "kernel_isa": _cpu_isa(),
        }
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _decisions() -> list[dict[str, Any]]:
    """Return for every operator and backend, on its own kind of device, whether it runs in float32, and why not."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    asked = [("cpu", backends.can_run_cpu, "cpu")]
    for name, can_run in (("cuda", backends.can_run_cuda), ("triton", backends.can_run_triton)):
        asked += [(name, can_run, gpu) for gpu in gpus or ["no GPU"]]
    found = []
    for name, can_run, device in asked:
        for op in backends.OPERATORS:
            # "meta" asks whether the kernel exists at all.
            decision = can_run(op, device="meta" if device == "no GPU" else device, dtype=torch.float32)
            ok, reason = decision
            has_kernel = ok
            if ok and device == "no GPU":
                ok, reason = False, f"the kernel is built, but {why_no_gpu()}"
            line = {"backend": name, "device": device, "op": op, "ok": ok, "reason": reason, "has_kernel": has_kernel}
            found.append(line)
    return found


def _what_runs(decisions: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """By kind of device and operator: the backend that `effkernels.ops.backends.choose` picks for float32.

    For a GPU where there is none, what it would pick on one: there the kernels are asked for, not the device.
    """
    gpus = list(dict.fromkeys(d["device"] for d in decisions if d["backend"] == "cuda"))
    found: dict[str, dict[str, str]] = {"cpu": {}, **{gpu: {} for gpu in gpus}}
    for device, by_op in found.items():
        asked = ("cpu",) if device == "cpu" else ("cuda", "triton")
        for op in backends.OPERATORS:
            can_run = {d["backend"]: d["has_kernel"] for d in decisions if (d["op"], d["device"]) == (op, device)}
            by_op[op] = next((name for name in asked if can_run.get(name)), "reference")
    return found


def _tuned() -> dict[str, str | None]:
    """By GPU: the file of its tuned plan, None if nothing is tuned."""
    found: dict[str, str | None] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        file = tuned_plan.file_of(tuned_plan.device_name(torch.device("cuda", index)) or "")
        found[f"cuda:{index}"] = str(file) if file.exists() else None
    return found


def run(arguments: argparse.Namespace) -> int:
    """Print what is installed and what can run here."""
    devices = _devices()
    versions = environment.versions("timm", "torchvision", "onnxruntime", "openvino")
    decisions = _decisions()
    runs = _what_runs(decisions)
    tuned = _tuned()
    report = {
        "version": effkernels.__version__,
        "commit": environment.commit()[0],
        "library": {
            "loaded": _library.is_loaded(),
            "error": _library.load_error(),
            "build": _library.build_info(),
        },
        "versions": versions,
        "devices": devices,
        "backend": backends.selected(),
        "runs": runs,
        "tuned": tuned,
        "operators": decisions,
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"effkernels {report['version']}, {environment.python_version()}")
    print("library    " + ("loaded" if _library.is_loaded() else f"not loaded: {_library.load_error()}"))
    for key, value in _library.build_info().items():
        print(f"  {key:<12} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print("versions")
    for package, version in versions.items():
        print(f"  {package:<12} {version or 'none'}")
    for device in devices:
        print(f"device {device['device']}")
        for key, value in device.items():
            if key != "device":
                print(f"  {key:<16} {', '.join(value) if isinstance(value, list) else value}")
        if device["device"] in tuned:
            print(f"  {'tuned':<16} {tuned[device['device']] or 'no: `effkernels tune` measures what is faster here'}")
    print("what runs by default in float32")
    for name, by_op in runs.items():
        print(f"  {'a GPU' if name == 'no GPU' else name:<6} {_grouped(by_op)}")
    if any(decision["backend"] == "triton" and decision["has_kernel"] for decision in decisions):
        print("  triton makes one launch per call, three for mbconv, and two for")
        print(f"    depthwise_bn_act_se       where an image of the result has more than {MOST_SCALED_ALONE} elements")
        print("    expand_depthwise_squeeze  where the expanded tensor does not fit the chip")
    print(f"backend {backends.selected()} (what runs float32; `reference` runs everything)")
    _print_decisions(decisions)
    return 0


def _grouped(by_op: dict[str, str]) -> str:
    """'cuda: every operator', or each backend with its operators."""
    groups: dict[str, list[str]] = {}
    for op, name in by_op.items():
        groups.setdefault(name, []).append(op)
    return "; ".join(
        f"{name}: {', '.join(ops) if len(groups) > 1 else 'every operator'}" for name, ops in groups.items()
    )


def _print_decisions(decisions: Sequence[dict[str, Any]]) -> None:
    """Per backend and device: the operators that run, then those that do not, by reason."""
    for name, device in dict.fromkeys((decision["backend"], decision["device"]) for decision in decisions):
        by_reason: dict[str, list[str]] = {}
        for decision in decisions:
            if (decision["backend"], decision["device"]) == (name, device):
                # A reason often names its operator; the same sentence is wanted once for all of them.
                reason = decision["reason"].replace(decision["op"], "this operator")
                by_reason.setdefault(reason, []).append(decision["op"])
        for reason, ops in by_reason.items():
            every = len(ops) == len(backends.OPERATORS)
            listed = ("no operator" if reason else "every operator") if every else ", ".join(ops)
            verdict = f"{'runs ' if every else 'does not run '}{listed}: {reason}" if reason else f"runs {listed}"
            print(f"  {name:<6} {device:<6}  {verdict}")

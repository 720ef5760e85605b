"""``effkernels info``: what is installed, and what can run here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch

import effkernels
from effkernels import _library, backends, environment
from effkernels.commands.common import add_json

TEXT = "Show version, build, devices, and which backend can run which operator."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    add_json(parser)


def _cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use in this process."""
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


def _decisions(device: str) -> list[dict[str, Any]]:
    """For every operator and backend whether it runs on a device, in float32, and why not."""
    asked = {"cuda": backends.can_run_cuda, "triton": backends.can_run_triton, "cpu": backends.can_run_cpu}
    return [
        {"device": device, "op": op, "backend": name, "ok": decision.ok, "reason": decision.reason}
        for op in backends.OPERATORS
        for name, can_run in asked.items()
        for decision in [can_run(op, device=device, dtype=torch.float32)]
    ]


def run(arguments: argparse.Namespace) -> int:
    """Print what is installed and what can run here."""
    devices = _devices()
    report = {
        "version": effkernels.__version__,
        "commit": environment.commit()[0],
        "library": {
            "loaded": _library.is_loaded(),
            "error": _library.load_error(),
            "build": _library.build_info(),
        },
        "versions": environment.versions("timm", "torchvision", "onnxruntime", "openvino"),
        "devices": devices,
        "backend": backends.selected(),
        "operators": [decision for device in devices for decision in _decisions(device["device"])],
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"effkernels {report['version']}, {environment.python_version()}")
    print("library    " + ("loaded" if _library.is_loaded() else f"not loaded: {_library.load_error()}"))
    for key, value in _library.build_info().items():
        print(f"  {key:<12} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    print("versions")
    for package, version in environment.versions("timm", "torchvision", "onnxruntime", "openvino").items():
        print(f"  {package:<12} {version or 'none'}")
    for device in devices:
        print(f"device {device['device']}")
        for key, value in device.items():
            if key != "device":
                print(f"  {key:<16} {', '.join(value) if isinstance(value, list) else value}")
    print(f"backend    {backends.selected()} (float32; `reference` runs everything)")
    for device in devices:
        _print_decisions(device["device"], _decisions(device["device"]))
    return 0


def _print_decisions(device: str, decisions: Sequence[dict[str, Any]]) -> None:
    """One line per backend where the answer is the same for all operators, else one line per operator."""
    for name in dict.fromkeys(decision["backend"] for decision in decisions):
        mine = [decision for decision in decisions if decision["backend"] == name]
        running = [decision["op"] for decision in mine if decision["ok"]]
        print(f"  on {device}, {name:<6} runs {', '.join(running) if running else 'nothing'}")
        reasons = dict.fromkeys(
            # The reason of an operator often contains its name; the same sentence is wanted once.
            decision["reason"].replace(decision["op"], "this operator")
            for decision in mine
            if not decision["ok"]
        )
        for reason in reasons:
            print(f"      not the others: {reason}" if running else f"      {reason}")

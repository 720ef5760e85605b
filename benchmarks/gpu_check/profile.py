"""Part `profile`: Nsight Compute on the main kernels at batch 256: memory throughput, occupancy, where warps wait."""

from __future__ import annotations

import csv
import io
import re
import sys
from pathlib import Path

import torch

import effkernels
from benchmarks.gpu_check import shapes
from benchmarks.gpu_check.common import WORK, NotAvailable, Options, python, run_part, tool_output
from benchmarks.gpu_check.progress import copy_out
from benchmarks.kernel_economy.reading import short_name
from effkernels import ops
from effkernels.ops.call import run

_SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")
_SHOWN = {
    "gpu__time_duration.sum": "time",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}
_STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")


def read_report(text: str) -> list[dict[str, str]]:
    """Kernels of ncu's raw CSV page, each with the shown metrics and the three largest reasons to wait.

    Raises:
        NotAvailable: there is no table in it.
    """
    start = text.find('"ID"')
    if start < 0:
        last = [line for line in text.splitlines() if line.startswith("==")] or text.splitlines()
        raise NotAvailable((last or ["ncu printed nothing"])[-1].strip("= "))
    lines = list(csv.reader(io.StringIO(text[start:])))
    header, units, *records = [line for line in lines if len(line) == len(lines[0])]
    kernels = []
    for record in records:
        values = dict(zip(header, record, strict=True))
        unit = dict(zip(header, units, strict=True))
        shown = {"kernel": short_name(values.get("Kernel Name", ""))}
        for metric, title in _SHOWN.items():
            if metric in values:
                suffix = f" {unit[metric]}" if title == "time" else ""
                shown[title] = values[metric] + suffix
        waits = {}
        for metric, value in values.items():
            match = _STALL.fullmatch(metric)
            if match and re.fullmatch(r"[\d.,]+", value):
                waits[match[1]] = float(value.replace(",", ""))
        largest = sorted(waits, key=lambda reason: -waits[reason])[:3]
        shown["waits for"] = ", ".join(f"{reason} {waits[reason]:.1f}" for reason in largest)
        kernels.append(shown)
    return kernels


def run_main_kernels(device: torch.device) -> None:
    """Run what ncu profiles: the first calls of the operator benchmark, once each, inputs drawn on the CPU."""
    batch, most = (256, 16) if device.type == "cuda" else (1, 2)
    with torch.inference_mode(), effkernels.backend(device.type):
        done: set[tuple[object, ...]] = set()
        families = [shapes.of_family("efficientnet_b0", op, batch) for op in shapes.FAMILIES]
        for one in shapes.in_turn(families):
            call = one.call
            key = (call.op, call.kernel, call.stride, call.gated, call.height > 20)
            if key in done or len(done) >= most:
                continue
            done.add(key)
            run(ops, call.op, call.arguments(torch.bfloat16, device, images=2))
            if device.type == "cuda":
                torch.cuda.synchronize()


def profile(options: Options) -> str:
    """Nsight Compute's account of the main kernels."""
    ncu = options.tool("ncu")
    sections = [argument for section in _SECTIONS for argument in ("--section", section)]
    command: list[str | Path] = [ncu, "--clock-control", "none", "--target-processes", "all", *sections]
    command += ["--csv", "--page", "raw"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:effkernels"]
    command += python("-m", "benchmarks.gpu_check.profile", "--kernels", options.device)
    status, output = tool_output(command, options.left - 2)
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "ncu.csv").write_text(output, encoding="utf-8")
    kernels = read_report(output)
    if not kernels:
        raise NotAvailable(f"ncu saw no kernel of this library (exit status {status})")
    text = "\n".join("  ".join(f"{title} {value}" for title, value in kernel.items()) for kernel in kernels)
    (WORK / "ncu.txt").write_text(text + "\n", encoding="utf-8")
    copy_out(WORK / "ncu.txt")
    print(text)
    return f"{len(kernels)} kernels, {WORK.name}/ncu.txt"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--kernels"]:
        run_main_kernels(torch.device(sys.argv[2]))
        sys.exit(0)
    sys.exit(run_part(profile))

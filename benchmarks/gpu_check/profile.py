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
from benchmarks.kernel_economy.reading import ToolMissing, find_tool, short_name
from effkernels import ops
from effkernels.op_timing import enlarged

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


def run_main_kernels() -> None:
    """What ncu watches: the first calls of the operator benchmark, once each, inputs drawn on the CPU."""
    device = torch.device("cuda")
    with torch.inference_mode(), effkernels.backend("cuda"):
        done: set[tuple[object, ...]] = set()
        for one in shapes.measurements(["efficientnet_b0"], [256]):
            key = (one.op, one.call.kernel, one.call.stride, one.call.gate, one.call.plane[0] > 20)
            if key in done or len(done) >= 16:
                continue
            done.add(key)
            case = enlarged(one.call.case(one.op, 2), one.batch, torch.bfloat16, device)
            case.prepare(ops, torch.bfloat16, device)()
            torch.cuda.synchronize()


def profile(options: Options) -> str:
    """Nsight Compute's account of the main kernels."""
    if options.device != "cuda":
        raise NotAvailable("needs a GPU")
    try:
        ncu = find_tool("ncu")
    except ToolMissing as missing:
        raise NotAvailable(str(missing)) from missing
    sections = [argument for section in _SECTIONS for argument in ("--section", section)]
    command: list[str | Path] = [
        ncu,
        "--clock-control",
        "none",
        "--target-processes",
        "all",
        *sections,
        "--csv",
        "--page",
        "raw",
    ]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:effkernels"]
    status, output = tool_output(
        [*command, *python("-m", "benchmarks.gpu_check.profile", "--kernels")], options.seconds
    )
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "ncu.csv").write_text(output, encoding="utf-8")
    kernels = read_report(output)
    if not kernels:
        raise NotAvailable(f"ncu saw no kernel of this library (exit status {status})")
    text = "\n".join("  ".join(f"{title} {value}" for title, value in kernel.items()) for kernel in kernels)
    (WORK / "ncu.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return f"{len(kernels)} kernels, {WORK.name}/ncu.txt"


if __name__ == "__main__":
    if sys.argv[1:] == ["--kernels"]:
        run_main_kernels()
        sys.exit(0)
    sys.exit(run_part(profile))

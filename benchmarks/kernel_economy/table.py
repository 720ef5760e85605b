"""The generated tables of docs/kernels.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from benchmarks.kernel_economy.counts import count_kernels
from benchmarks.kernel_economy.limits import issued_by
from benchmarks.kernel_economy.pointwise import epilogue_of, tile_of
from benchmarks.kernel_economy.reading import ROOT, Kernel, compile_sources, nvcc_version, read_kernels
from benchmarks.kernel_economy.rules import claim_of
from benchmarks.sections import Section
from effkernels.plan import gpus
from effkernels.plan.kernel_counts import PIPES
from effkernels.plan.launches import plan_model
from effkernels.plan.time_estimate import MODES, OVERLAPPING, TERMS

PAGE = ROOT / "docs" / "kernels.md"
SECTION = Section(
    "docs/kernels.md", "<!-- kernels: written by python -m benchmarks.kernel_economy -->", "<!-- end of kernels -->"
)
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hard_swish", "gelu", "gelu_tanh")  # the order of params.h
_PROBE = Path(__file__).with_name("activations.cu")


def caption(version: str) -> str:
    """Return the line that names the tools that made the tables, which are valid for that compiler only."""
    return f"Compiled by nvcc {version} for sm_90."


def kernel_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Return one line per kernel: registers, what fits a multiprocessor by registers, wide accesses, products."""
    lines = [
        "| kernel | registers | blocks x threads | 16-byte loads | cp.async | 16-byte stores | HMMA | FFMA "
        "| MUFU TANH, EX2, RCP |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kernel in kernels:
        special = kernel.special_functions
        threads = kernel.max_threads
        lines.append(
            f"| `{kernel.name}` | {kernel.registers} | {kernel.resident_blocks(threads)} x {threads} "
            f"| {kernel.accesses('LDG')[16]} | {kernel.accesses('LDGSTS')[16]} | {kernel.accesses('STG')[16]} "
            f"| {kernel.count('HMMA')} | {kernel.count('FFMA')} "
            f"| {special['TANH']}, {special['EX2']}, {special['RCP']} |"
        )
    return lines


def claim_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Return the claims of each family; every claim includes that nothing is spilled."""
    lines = ["| kernels | claim |", "|---|---|"]
    for claim in dict.fromkeys(claim for kernel in kernels if (claim := claim_of(kernel))):
        names = [kernel.name for kernel in kernels if claim_of(kernel) == claim]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"| `{names[0]}`{more} | {claim.says} |")
    return lines


def issued_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Return the instructions of each unit of work of the bfloat16 kernels, their limits, and what executes them."""
    lines = [f"| kernel | for each | at most | {' | '.join(PIPES)} |", "|---|---|--:|" + "--:|" * len(PIPES)]
    for kernel in kernels:
        if "bfloat16" not in kernel.arguments:
            continue
        name = f"`{kernel.name}`"
        if kernel.family.startswith("pointwise"):
            tile = tile_of(kernel)
            name += f", {tile.rows}x{tile.columns}, {epilogue_of(kernel)}"
        for one in issued_by(kernel):
            cells = " | ".join(f"{value:.4g}" for value in astuple(one.counters))
            lines.append(f"| {name} | {one.unit} | {'' if one.most is None else one.most} | {cells} |")
    return lines


# Kernels of networks in bfloat16. The parts that depthwise kernels share are told for one of them.
_HOT = (
    r"depthwise_strips<bfloat16,[35],[12],\d>|pointwise(?:_pool)?<bfloat16,.*|conv\w*<bfloat16.*|norm_act<bfloat16,8>"
    r"|scale_by_gate<bfloat16,8>"
)
_SHARED_PARTS_OF = "depthwise_strips<bfloat16,5,1,7>"
_OWN_PARTS = ("row", "row.border", "strip")


def part_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Return the instructions of a warp in one pass through each part of the hot kernels, by pipe."""
    lines = [f"| kernel | part | {' | '.join(PIPES)} |", "|---|---|" + "--:|" * len(PIPES)]
    for name, counts in count_kernels(kernels).items():
        if not re.fullmatch(_HOT, name):
            continue
        for part, counters in counts.parts.items():
            if name.startswith("depthwise_strips") and name != _SHARED_PARTS_OF and part not in _OWN_PARTS:
                continue
            cells = " | ".join(f"{value:.4g}" for value in astuple(counters))
            lines.append(f"| `{name}` | {part} | {cells} |")
    return lines


def launch_time_lines() -> list[str]:
    """Return the estimate of every launch of EfficientNet-B0 at batch 256 in bfloat16 on an H200."""
    plan = plan_model("efficientnet_b0", gpu="h200", batch_size=256)
    lines = [
        f"| layer | kernel | grid | blocks x threads | MB | {' | '.join(TERMS)} | us |",
        "|---|---|--:|--:|--:|" + "--:|" * (len(TERMS) + 1),
    ]
    for launch in plan.launches:
        time = launch.time
        cells = [f"{getattr(time, term):.1f}" for term in TERMS]
        marked = OVERLAPPING.index(time.longest)
        cells[marked] = f"**{cells[marked]}**"
        grid = "" if launch.grid is None else str(launch.grid)
        threads = "" if launch.block is None else f"{time.blocks} x {launch.block[0] * launch.block[1]}"
        lines.append(
            f"| {launch.layer} | {launch.variant or launch.kernel} | {grid} | {threads} | {launch.bytes / 1e6:.1f} "
            f"| {' | '.join(cells)} | {time.us:.1f} |"
        )
    return lines


def sum_lines() -> list[str]:
    """Return the estimated time of a forward in bfloat16, by GPU, model and batch size."""
    batches = (1, 32, 256)
    lines = [
        f"| model | GPU | {' | '.join(f'batch {batch}, {mode}' for batch in batches for mode in MODES)} |",
        "|---|---|" + "--:|" * (len(batches) * len(MODES)),
    ]
    for model in ("efficientnet_b0", "efficientnet_b4"):
        for gpu in gpus.GPUS:
            plans = [plan_model(model, gpu=gpu, batch_size=batch) for batch in batches]
            cells = " | ".join(f"{plan.estimated_us(mode):.0f}" for plan in plans for mode in MODES)
            lines.append(f"| {model} | {gpu.name} | {cells} |")
    return lines


def activation_lines(folder: Path) -> list[str]:
    """Return the special functions for an element of every activation and type, counted in a probe of its own."""
    (binary,) = compile_sources([_PROBE], 90, folder)
    counted: dict[tuple[str, str], str] = {}
    for kernel in read_kernels(binary):
        elements = 16 // kernel.element_bytes
        each = {kind: count // elements for kind, count in sorted(kernel.special_functions.items())}
        words = " + ".join(f"{count} {kind}" for kind, count in each.items() if count)
        counted[kernel.arguments[0], ACTIVATIONS[int(kernel.arguments[1])]] = words or "0"
    types = ("float32", "float16", "bfloat16")
    lines = ["| activation | " + " | ".join(types) + " |", "|---|" + "---|" * len(types)]
    for name in ACTIVATIONS:
        lines.append(f"| {name} | " + " | ".join(counted[kind, name] for kind in types) + " |")
    return lines


def section(kernels: Sequence[Kernel], folder: Path) -> str:
    """Return the text between the markers.

    Args:
        kernels: of the library; those for sm_90 count.
        folder: for files of the compiler.
    """
    shown = [kernel for kernel in kernels if kernel.arch == 90]
    blocks = [
        caption(nvcc_version()),
        "### Claims\n\nEvery kernel: no spilled register, no local memory.",
        "\n".join(claim_lines(shown)),
        "### What the compiler made of them\n\nCounts of instructions in the code, not of executions; blocks by "
        "registers and threads alone.",
        "\n".join(kernel_lines(shown)),
        "### Instructions issued for each unit of work\n\nBy a warp of the bfloat16 kernels, from the parts below: for "
        "a value of the result, for a block, for a tile of a product or a step of it along k, with gates where the "
        "kernel takes them. A multiprocessor issues 4 instructions of 32 lanes in a clock.",
        "\n".join(issued_lines(shown)),
        "### Special-function instructions per element",
        "\n".join(activation_lines(folder)),
        "### Instructions of a warp in each part of a kernel\n\nIn one pass through the part, counted in the "
        "disassembly along the way that a network takes; `effkernels/plan/kernel_counts.py` says what the columns are, "
        "`effkernels/plan/work.py` and the files beside it how often each part runs.",
        "\n".join(part_lines(shown)),
        "### Estimated time of each launch: EfficientNet-B0 at batch 256, bfloat16, on an H200\n\nMicroseconds, as "
        "`effkernels explain --model-time` prints them: the longest of the first nine terms, in bold, and the others "
        "on top of it. An estimate; nothing here was measured.",
        "\n".join(launch_time_lines()),
        "### Estimated time of a forward\n\nMicroseconds in bfloat16, all launches and the gaps between them. An "
        "estimate; nothing here was measured. Instructions are those of the code for sm_90 on every GPU.",
        "\n".join(sum_lines()),
    ]
    return "\n\n".join(blocks)

"""The generated tables of docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernel_economy import estimate
from benchmarks.kernel_economy.pointwise_loops import PIPES, epilogue_of, pointwise_issued, tile_of
from benchmarks.kernel_economy.reading import ROOT, Kernel, compile_sources, nvcc_version, read_kernels
from benchmarks.kernel_economy.rules import claim_of, element_bytes, issued

PAGE = ROOT / "docs" / "kernels.md"
BEGIN = "<!-- kernels: written by python -m benchmarks.kernel_economy -->"
END = "<!-- end of kernels -->"
ACTIVATIONS = ("identity", "relu", "relu6", "silu", "hard_swish", "gelu", "gelu_tanh")  # the order of params.h
_PROBE = Path(__file__).with_name("activations.cu")


def caption(version: str) -> str:
    """The line that tells what the tables were made with; they hold for that compiler only."""
    return f"Compiled by nvcc {version} for sm_90."


def kernel_lines(kernels: Sequence[Kernel]) -> list[str]:
    """One line per kernel: registers, what fits a multiprocessor by registers, wide accesses, products."""
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
    """What each family claims; every claim includes that nothing is spilled."""
    lines = ["| kernels | claim |", "|---|---|"]
    for claim in dict.fromkeys(claim for kernel in kernels if (claim := claim_of(kernel))):
        names = [kernel.name for kernel in kernels if claim_of(kernel) == claim]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"| `{names[0]}`{more} | {claim.says} |")
    return lines


def issued_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Instructions of the depthwise kernels for each value of the result, by pipe."""
    pipes = ("FMA", "ALU", "special", "memory", "shared")
    lines = [
        f"| kernel | inside | at the border | {' | '.join(pipes)} |",
        "|---|--:|--:|" + "--:|" * len(pipes),
    ]
    for kernel in kernels:
        sixteen_bits = element_bytes(kernel) == 2  # whose swish the way is told by
        if kernel.family == "depthwise_strips" and sixteen_bits and int(kernel.arguments[1]) > 0:
            found = issued(kernel)
            each = " | ".join(f"{found.pipes.get(pipe, 0.0):.1f}" for pipe in pipes)
            lines.append(f"| `{kernel.name}` | {found.inside:.1f} | {found.border:.1f} | {each} |")
    return lines


def pointwise_lines(kernels: Sequence[Kernel]) -> list[str]:
    """Instructions of a warp of the 16-bit pointwise kernels, by part of the work, and of a step by pipe."""
    parts = ("prologue", "tile", "step", "weights", "epilogue", "residual")
    lines = [
        f"| kernel | tile | activation | {' | '.join(parts)} | {' | '.join(f'step: {pipe}' for pipe in PIPES)} |",
        "|---|---|---|" + "--:|" * (len(parts) + len(PIPES)),
    ]
    for kernel in kernels:
        if kernel.family != "pointwise" or element_bytes(kernel) != 2 or kernel.arguments[-1] == "true":
            continue
        found, tile = pointwise_issued(kernel), tile_of(kernel)
        counts = [getattr(found, part).total() for part in parts] + [found.step[pipe] for pipe in PIPES]
        lines.append(
            f"| `{kernel.name}` | {tile.rows}x{tile.columns}, {tile.threads} threads | {epilogue_of(kernel)} "
            f"| {' | '.join(map(str, counts))} |"
        )
    return lines


def activation_lines(folder: Path) -> list[str]:
    """Special-function instructions per element of every activation and type, counted in a probe of its own."""
    (binary,) = compile_sources([_PROBE], 90, folder)
    counted: dict[tuple[str, str], str] = {}
    for kernel in read_kernels(binary):
        elements = 16 // element_bytes(kernel)
        each = {kind: count // elements for kind, count in sorted(kernel.special_functions.items())}
        words = " + ".join(f"{count} {kind}" for kind, count in each.items() if count)
        counted[kernel.arguments[0], ACTIVATIONS[int(kernel.arguments[1])]] = words or "0"
    types = ("float32", "float16", "bfloat16")
    lines = ["| activation | " + " | ".join(types) + " |", "|---|" + "---|" * len(types)]
    for name in ACTIVATIONS:
        lines.append(f"| {name} | " + " | ".join(counted[kind, name] for kind in types) + " |")
    return lines


def section(kernels: Sequence[Kernel], folder: Path) -> str:
    """What stands between the markers.

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
        "### Instructions issued for each value of the result\n\nAlong the way of a strip with swish and with channel "
        "sums, counted in the disassembly: a strip inside the image, one at its left or right border, and the first of "
        "them by pipe. A multiprocessor issues 4 instructions of 32 lanes in a clock.",
        "\n".join(issued_lines(shown)),
        "### Instructions issued by a warp of the pointwise kernel\n\nCounted in the disassembly, along the way of a "
        "call of a network: for a block before its first tile, for each tile, for each step of 64 bytes along k (with "
        "gates where the kernel takes them), more where the weights pass through the ring, to write a tile (one vector "
        "a thread where any activation is taken), more where a residual is added.",
        "\n".join(pointwise_lines(shown)),
        "### Special-function instructions per element",
        "\n".join(activation_lines(folder)),
        "### Estimates for EfficientNet-B0 at batch 256, bfloat16, on an H200\n\nTime of each need alone, in "
        "microseconds, every unit at its full rate; the longest, in bold, is the floor. Nothing here was measured.",
        "\n".join(estimate.table(shown)),
    ]
    return "\n\n".join(blocks)


def with_section(page: str, text: str) -> str:
    """The page with what stands between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for marker in (BEGIN, END):
        if page.count(marker) != 1:
            raise ValueError(f"docs/kernels.md: the marker {marker!r} must stand there once")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"

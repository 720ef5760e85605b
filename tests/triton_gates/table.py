"""Writes what Triton made of its kernels into docs/kernels.md: python -m triton_gates.table READINGS, a file that
triton_gates.worker wrote for sm_90.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton_gates.calls import CompiledCall, CompiledStep
from triton_gates.rules import TritonKernel
from triton_gates.worker import operators, results_and_arguments

from benchmarks.sections import Section
from effkernels.triton import _launch, training_step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
SECTION = Section(
    "docs/kernels.md",
    "<!-- Triton's kernels: written by tests/triton_gates/table.py -->",
    "<!-- end of Triton's kernels -->",
)
_COLUMNS = ("call", "kernel", "MB", "registers", "warps", "shared KB", "16-byte loads", "cp.async", "16-byte stores",
            "HMMA, WGMMA", "FFMA", "TANH")  # fmt: skip


def megabytes(call: CompiledCall | CompiledStep) -> float:
    """Return the least a call can move: every argument read once, every result written once."""
    if isinstance(call, CompiledStep):
        arguments: list[Any] = [t for t in call.on_meta() if isinstance(t, torch.Tensor)]
        with patch.object(_launch, "run"):
            results = training_step(call.op)(*call.on_meta())
    else:
        results, *arguments = results_and_arguments(operators()[call.op], call)
    parts: list[Any] = [*arguments, results]
    tensors = [t for part in parts for t in (part if isinstance(part, tuple) else (part,)) if hasattr(t, "nbytes")]
    return sum(t.nbytes for t in tensors) / 1e6


def section(kernels: Iterable[TritonKernel]) -> str:
    """Return the table of all kernels of sm_90, a line each."""
    lines = [
        f"Compiled by Triton {triton.__version__} for sm_90. MB: of the call, every argument read and every result",
        "written once. Counts of instructions in the code, not of executions.\n",
    ]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|---" + "|--:" * (len(_COLUMNS) - 2) + "|"]
    for kernel in kernels:
        assert kernel.call is not None
        counts: list[Any] = [
            str(kernel.call),
            f"`{kernel.name}`",
            f"{megabytes(kernel.call):.3g}",
            kernel.registers,
            kernel.max_threads // 32,
            f"{kernel.shared / 1024:.0f}",
            *(kernel.accesses(opcode)[16] for opcode in ("LDG", "LDGSTS", "STG")),
            kernel.count("HMMA") + kernel.count("HGMMA"),
            kernel.count("FFMA"),
            kernel.special_functions["TANH"],
        ]
        lines.append("| " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    readings = pickle.loads(Path(sys.argv[1]).read_bytes())
    PAGE.write_text(SECTION.replaced(PAGE.read_text(encoding="utf-8"), section(readings["calls"])), encoding="utf-8")

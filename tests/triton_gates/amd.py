"""The kernels for gfx942 (AMD Instinct MI300), of which no more is asked than that they are sound.

They are read from the assembly that Triton's compiler prints, so that no disassembler is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from triton_gates.calls import BFLOAT16, CALLS, TRAINING, CompiledCall, CompiledStep

ARCHITECTURE = "gfx942"
MULTIPROCESSORS = 304  # compute units of an MI300X
MOST_SHARED = 64 * 1024  # of a workgroup


@dataclass(frozen=True)
class AmdKernel:
    """One kernel as Triton compiled it for an AMD GPU.

    Attributes:
        scratch: bytes of a thread in memory. What is spilled to accumulation registers takes none.
        shared: bytes of a workgroup.
    """

    name: str
    call: CompiledCall | CompiledStep
    scratch: int
    shared: int
    instructions: Counter[str]


def calls() -> list[CompiledCall | CompiledStep]:
    """Return one of each kind in bfloat16; the other types, and other sizes, take the same ways here."""
    kinds: dict[tuple[object, ...], CompiledCall] = {}
    for call in CALLS:
        if call.dtype is BFLOAT16:
            kinds.setdefault((call.op, call.kernel, call.stride, call.gated, call.wide), call)
    steps = {call.op: call for call in reversed(TRAINING) if call.dtype is BFLOAT16 and call.wide}
    return [*kinds.values(), *steps.values()]


def read(compiled: Any, name: str, call: CompiledCall | CompiledStep) -> AmdKernel:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{key}:\s+(\d+)", text))

    opcodes = re.findall(r"^\s+((?:global|buffer|scratch|v_mfma)_\w+)", text, flags=re.MULTILINE)
    return AmdKernel(name, call, number("private_segment_fixed_size"), compiled.metadata.shared, Counter(opcodes))


def broken(kernel: AmdKernel) -> list[str]:
    """Return one line for everything that a kernel must not do."""
    found = []
    if kernel.scratch:
        found.append(f"{kernel.scratch} bytes of scratch memory")
    if kernel.shared > MOST_SHARED:
        found.append(f"{kernel.shared} bytes of shared memory; {MOST_SHARED} is the most")
    if kernel.name in ("pointwise_kernel", "expand_depthwise_kernel", "conv_kernel") and not any(
        op.startswith("v_mfma") for op in kernel.instructions
    ):
        found.append("no matrix instruction (MFMA)")
    # Some read a little, some gather, and tiles for 128 threads leave the 256 of four wavefronts half a vector each.
    narrow = ("squeeze_excite_kernel", "conv_kernel", "join_kernel")
    narrow += ("statistics_kernel", "sums_kernel", "convolve_kernel", "weight_gradient_kernel")
    reads_vectors = kernel.name not in narrow
    if reads_vectors and kernel.call.wide and not any(op.endswith("load_dwordx4") for op in kernel.instructions):
        found.append("no load of 16 bytes")
    return [f"{kernel.name} ({ARCHITECTURE}) of {kernel.call}: {line}" for line in found]

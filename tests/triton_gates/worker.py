"""Compiles all kernels for one architecture and writes what was read of them: python -m triton_gates.worker 90 OUT,
or gfx942 in place of 90. `python -m triton_gates.worker 90 OUT usual` compiles every second call.

A process of its own, because whether Triton compiles or interprets is settled when it is imported. No GPU is needed:
Triton compiles for whatever its driver names, and the driver here only names a GPU.
"""

from __future__ import annotations

import importlib
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton_gates import amd
from triton_gates.calls import ALL_CALLS, USUAL_CALLS, CompiledCall, CompiledStep
from triton_gates.mutants import WAYS
from triton_gates.rules import MULTIPROCESSORS, TritonKernel

from benchmarks.kernel_economy.reading import opcodes
from effkernels import ops
from effkernels import triton as families
from effkernels._norm import gather_norms
from effkernels.ops._registration import Operator, Overloads
from effkernels.triton import _launch


class Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def processor_seconds() -> float:
    """Of this process and of the assemblers that it waited for: a busy machine does not lengthen them."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def read(compiled: Any, name: str, call: CompiledCall | CompiledStep | None, arch: int, seconds: float) -> TritonKernel:
    """Return what a kernel became, by the disassembler that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    return TritonKernel(
        name=name,
        arch=arch,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        shared=compiled.metadata.shared + (1024 if arch >= 90 else 0),
        max_threads=32 * compiled.metadata.num_warps,
        min_blocks=0,
        instructions=opcodes(code),
        call=call,
        roundings=compiled.asm["ptx"].count("cvt.rna.tf32"),
        seconds=seconds,
    )


def _tool(name: str, *arguments: str) -> str:
    path = str(getattr(triton.knobs.nvidia, name).path)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def compile_calls(
    calls: Iterable[CompiledCall | CompiledStep],
    multiprocessors: int,
    capability: int,
    take: Callable[[Any, str, Any, float], None],
) -> None:
    """Compile the kernels of every call as the operator would launch them on a GPU with so many multiprocessors and the
    compute capability `capability`.x, and hand each to `take`.
    """
    current: list[CompiledCall | CompiledStep] = []

    def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        before = processor_seconds()
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        take(compiled, kernel.fn.__name__, current[-1], processor_seconds() - before)

    _launch.run = compile_instead
    names = {*families.FAMILIES.values(), *families.TRAINING_STEPS.values()}
    for module in {importlib.import_module(f"effkernels.triton.{name}") for name in names}:
        if hasattr(module, "multiprocessors"):
            module.multiprocessors = lambda device: multiprocessors
        if hasattr(module, "capability_of"):
            module.capability_of = lambda device: capability
    known = operators()
    for call in calls:
        current.append(call)
        if isinstance(call, CompiledStep):
            families.training_step(call.op)(*call.on_meta())
        else:
            launch(known[call.op], call)


def compiled_calls(arch: int, calls: Iterable[CompiledCall | CompiledStep]) -> list[TritonKernel]:
    found: list[TritonKernel] = []
    seen: set[str] = set()

    def take(compiled: Any, name: str, call: CompiledCall | CompiledStep, seconds: float) -> None:
        if isinstance(call, CompiledStep):  # several steps launch some of the kernels
            if compiled.hash in seen:
                return
            seen.add(compiled.hash)
        found.append(read(compiled, name, call, arch, seconds))

    compile_calls(calls, MULTIPROCESSORS[arch], arch // 10, take)
    return found


def compiled_for_amd() -> list[amd.AmdKernel]:
    torch.version.hip = "0"  # what kernels ask for before they use an instruction of NVIDIA's
    found: list[amd.AmdKernel] = []
    compile_calls(amd.calls(), amd.MULTIPROCESSORS, 0, lambda k, name, call, _: found.append(amd.read(k, name, call)))
    return found


def operators() -> dict[str, Operator[Any]]:
    """Return every operator of effkernels.ops by name."""
    modules = [importlib.import_module(f"effkernels.ops.{found.name}") for found in pkgutil.iter_modules(ops.__path__)]
    return {value.op.name: value.op for m in modules for value in vars(m).values() if isinstance(value, Overloads)}


def launch(op: Operator[Any], call: CompiledCall) -> None:
    """As effkernels.ops._registration runs a Triton kernel, on tensors without storage."""
    families.implementation(op.name)(*results_and_arguments(op, call))


def results_and_arguments(op: Operator[Any], call: CompiledCall) -> tuple[Any, ...]:
    """The results that a kernel of `call` fills, and its arguments."""
    given = gather_norms({"allow_tf32": False, **call.on_meta()})
    arguments = [given.get(name) for name in op.signature.names]
    return op.results(*arguments), *arguments


def compiled_mutants(arch: int) -> dict[str, TritonKernel]:
    found = {}
    for name, way in WAYS.items():
        before = processor_seconds()
        compiled = way.compile()
        seconds = processor_seconds() - before
        found[name] = read(compiled, f"product<{str(way.dtype).removeprefix('torch.')}>", None, arch, seconds)
    return found


def main(arch: str, target: Path, calls: Iterable[CompiledCall | CompiledStep] = ALL_CALLS) -> None:
    if arch == amd.ARCHITECTURE:
        driver.set_active(Absent(GPUTarget("hip", arch, 64)))
        readings: dict[str, Any] = {"calls": compiled_for_amd() if "amd" in backends else None}
    else:
        driver.set_active(Absent(GPUTarget("cuda", int(arch), 32)))
        readings = {"calls": compiled_calls(int(arch), calls), "mutants": compiled_mutants(int(arch))}
    target.write_bytes(pickle.dumps({**readings, "triton": triton.__version__}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), USUAL_CALLS if sys.argv[3:] == ["usual"] else ALL_CALLS)

"""The host side of the emulator: what it counts and records, devices, streams, captures, and that the operators of the
library really run on it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import op_cases
import pytest
import torch
from emulation.control import A100, H200, Emulation, Emulator
from op_cases import Case

import effkernels
from effkernels.ops import backends

ROOT = Path(__file__).resolve().parent.parent


def launch(emulated: Emulator, name: str, n: int, **options) -> dict[str, int]:
    x, y = torch.randn(4096), torch.zeros(4096)
    assert emulated.run(name, x, y, n, **options) == "cudaSuccess"
    return emulated.launches()[-1]


def test_launches_are_recorded(emulated: Emulator) -> None:
    launch(emulated, "read_first_word", 0, grid=(4, 3), block=(32, 2), shared_bytes=100, cluster=2)
    launch(emulated, "read_first_word", 0, cooperative=True)
    first, second = emulated.launches()
    assert first["grid"] == (4, 3, 1)
    assert first["block"] == (32, 2, 1)
    assert (first["shared_bytes"], first["cluster"], first["cooperative"]) == (100, 2, False)
    assert (second["shared_bytes"], second["cluster"], second["cooperative"]) == (0, 1, True)
    emulated.configure(Emulation(flavour=emulated.flavour))
    assert emulated.launches() == []


def test_bytes_are_counted(emulated: Emulator) -> None:
    """Each byte once, all accesses, and those of 16 bytes; nothing of shared memory and of the kernel's arguments."""
    if emulated.flavour != "race":
        pytest.skip("bytes are counted by make test-race")

    def counted(name: str, n: int, **options) -> list[int]:
        record = launch(emulated, name, n, **options)
        names = ("unique_bytes_{}", "bytes_{}", "bytes_{}_by_16")
        return [record[name.format(way)] for way in ("read", "written") for name in names]

    assert counted("copy_words", 100, grid=2) == [400, 400, 0, 400, 400, 0]
    assert counted("copy_vectors", 100, grid=2) == [1600, 1600, 1600, 1600, 1600, 1600]
    assert counted("rotate_block", 0, block=64, shared_bytes=256) == [256, 256, 0, 256, 256, 0]
    assert counted("copy_async_used", 0, shared_bytes=512) == [512, 512, 512, 128, 128, 0]
    assert counted("read_first_word", 0, grid=3) == [4, 4 * 32 * 3, 0, 0, 0, 0]


def test_devices(emulated: Emulator) -> None:
    """Each set of limits is a device of its own, so that what is kept per device stays right."""
    module = emulated.module
    first = module.use_device(list(H200))
    second = module.use_device(list(A100))
    assert first != second
    assert module.use_device(list(H200)) == first
    for limits, blocks in ((H200, 2), (A100, 1)):
        module.use_device(list(limits))
        assert module.blocks_per_multiprocessor(128, 100_000) == blocks
    assert module.blocks_per_multiprocessor(128, 200_000) == 0
    assert module.blocks_per_multiprocessor(1024, 0) == 1  # by 64 registers a thread


def run_gate(batch: int) -> tuple[torch.Tensor, ...]:
    case = Case("depthwise_bn_act_gate", batch=batch, height=30, width=30, channels=40)
    with backends.backend("cpu"):
        return op_cases.run(effkernels.ops, case, case.draw())


@pytest.mark.usefixtures("compiled")
def test_operators_run_on_the_emulator(emulated: Emulator) -> None:
    """For the length of a block only, and with the results that the operator in the emulator's own namespace has."""
    training = {name for name in emulated.operators() if name.startswith("training_")}
    assert len(training) == 14
    assert emulated.operators() - training == {*backends.OPERATORS, "mbconv_stack"}
    run_gate(2)
    assert emulated.launches() == []
    with emulated.in_place_of_cpu():
        y, gate = run_gate(2)
    assert len(emulated.launches()) > 0
    before = len(emulated.launches())
    again = run_gate(2)
    assert len(emulated.launches()) == before
    torch.testing.assert_close(y, again[0])
    torch.testing.assert_close(gate, again[1])


@pytest.mark.usefixtures("compiled")
def test_counters_of_streams_and_captures(emulated: Emulator) -> None:
    """Launches on two streams and in a captured graph have counters of their own, and a graph gives its own back."""
    with emulated.in_place_of_cpu():
        wanted = run_gate(3)
        for stream in (1, 2, 1):
            emulated.module.set_stream(stream)
            assert all(torch.equal(a, b) for a, b in zip(wanted, run_gate(3), strict=True))
        emulated.module.set_capturing(True)
        assert all(torch.equal(a, b) for a, b in zip(wanted, run_gate(3), strict=True))
        emulated.module.set_capturing(False)
        assert emulated.module.destroy_graphs() == 1
        assert emulated.module.destroy_graphs() == 0


def compiler(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the compiler on a kernel file, as the emulator's build calls it."""
    command = os.environ.get("CXX", "c++")
    if shutil.which(command) is None:
        pytest.skip(f"the C++ compiler {command} was not found")
    folders = [f"-I{ROOT / folder}" for folder in ("tests/emulation", "csrc", "csrc/cuda")]
    options = ["-std=c++17", "-DEFFKERNELS_EMULATED=1", *folders, *arguments]
    return subprocess.run([command, *options], capture_output=True, text=True, check=False)


def test_shared_variables_are_refused(tmp_path: Path) -> None:
    """Only dynamic shared memory is checked to the byte, so there is no other."""
    source = tmp_path / "kernel.cu"
    source.write_text('#include "compat.cuh"\n__global__ void kernel() { __shared__ float values[32]; }\n')
    done = compiler("-fsyntax-only", "-x", "c++", str(source))
    assert done.returncode != 0
    assert "kernels keep to dynamic shared memory" in done.stderr


@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu")))
def test_no_cuda_header_is_needed(source: str) -> None:
    done = compiler("-M", "-x", "c++", str(ROOT / "csrc/cuda" / source))
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"\S*(?:cuda_runtime|cuda_fp16|cuda_bf16|vector_functions)\S*", done.stdout)

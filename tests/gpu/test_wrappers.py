"""One golden test for each wrapper of csrc/cuda/ptx.cuh: what the instruction does is what its comment says.

The same kernels (wrappers.cu) run on a GPU and over the emulator, and both are held against definitions in Python, so
that the emulator is known to do what the hardware does.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernel_economy.reading import ToolMissing, find_tool

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
SOURCES = (ROOT / "tests/gpu/wrappers.cu", ROOT / "csrc/cuda/device.cu")

pytestmark = pytest.mark.xdist_group("wrappers")  # one worker compiles them


@dataclass(frozen=True)
class Wrappers:
    """The compiled wrappers.cu and the device that its pointers are of."""

    library: ctypes.CDLL
    device: torch.device

    def run(self, name: str, *arguments: Tensor | int) -> None:
        """Call a function of wrappers.cu on the current stream and wait for it."""
        stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        error = getattr(self.library, name)(ctypes.c_void_p(stream), *values)
        assert error == 0, f"{name}: CUDA error {error}"
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def limits(self, device: int) -> list[int]:
        """`DeviceLimits` of a device, in the order of the struct."""
        values = (ctypes.c_int * 8)()
        self.library.limits_of.restype = ctypes.c_char_p
        error = self.library.limits_of(device, values)
        assert error is None, error
        return list(values)


def engine_sources() -> list[Path]:
    """Return the emulator without its kernels and operators, as its CMakeLists.txt lists it."""
    listed = re.search(r"set\(engine_sources ([^)]*)\)", (EMULATION / "CMakeLists.txt").read_text())
    assert listed is not None
    return [EMULATION / name for name in listed[1].split()]


@cache
def compiled(kind: str, folder: Path) -> ctypes.CDLL | str:
    """Return the library, or why it is not there."""
    target = folder / f"wrappers_{kind}.so"
    common = ["-std=c++17", "-shared", "-I", str(ROOT / "csrc")]
    if kind == "cuda":
        if not torch.cuda.is_available():
            return "needs a GPU"
        try:
            nvcc = find_tool("nvcc")
        except ToolMissing as missing:
            return str(missing)
        major, minor = torch.cuda.get_device_capability()
        command = [str(nvcc), *common, "-O2", f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC", *map(str, SOURCES)]
    else:
        compiler = shutil.which("g++")
        if compiler is None:
            return "the emulator needs g++"
        command = [compiler, *common, "-O1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
        command += ["-DEFFKERNELS_EMULATED=1", "-DEFFKERNELS_EMULATION_PLAIN=1", "-I", str(EMULATION), "-x", "c++"]
        command += [*map(str, SOURCES), *map(str, engine_sources())]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    return ctypes.CDLL(str(target)) if done.returncode == 0 else f"does not compile: {done.stderr[-3000:]}"


@pytest.fixture(params=["emulated", "cuda"])
def wrappers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wrappers:
    """The wrappers on the emulator and on the GPU."""
    library = compiled(request.param, tmp_path_factory.getbasetemp())
    if isinstance(library, str):
        assert not library.startswith("does not compile"), library
        pytest.skip(library)
    return Wrappers(library, torch.device("cuda" if request.param == "cuda" else "cpu"))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_integers(*shape: int, seed: int) -> Tensor:
    """From -8 to 8: their products and sums are exact in every type used here, in whichever order they are added."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_tanh_approx(wrappers: Wrappers) -> None:
    """Within 2^-11 of tanh, the limits kept."""
    x = torch.cat([numbers(250) * 3, torch.tensor([30.0, -30.0, 0.0, float("inf"), float("-inf")])]).to(wrappers.device)
    y = torch.full_like(x, float("nan"))
    wrappers.run("run_tanh", x, y, x.numel())
    wanted = torch.tanh(x.double())
    # 2^-11, and the half unit in the last place by which CUDA's tables give the bound as 2^-10.987.
    assert bool(((y.double() - wanted).abs() <= 2.0**-10.987 * wanted.abs()).all())
    assert y[-3:].tolist() == [0.0, 1.0, -1.0]


def test_tanh_approx_keeps_nan(wrappers: Wrappers) -> None:
    x = torch.tensor([float("nan")], device=wrappers.device)
    y = torch.zeros_like(x)
    wrappers.run("run_tanh", x, y, 1)
    assert bool(torch.isnan(y).all())


def test_to_tf32(wrappers: Wrappers) -> None:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    ties = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 - 2.0**-23])
    x = torch.cat([numbers(124) * 100, ties]).to(wrappers.device)
    y = torch.zeros(x.shape, dtype=torch.int32, device=wrappers.device)
    wrappers.run("run_to_tf32", x, y, x.numel())
    wanted = (x.view(torch.int32) + 0x1000) & ~0x1FFF
    assert torch.equal(y & ~0x1FFF, wanted)


@pytest.mark.parametrize("blocks", [3, 200])
def test_launches_that_overlap_wait_for_each_other(wrappers: Wrappers, blocks: int) -> None:
    """Each of ten launches reads what the one ahead wrote, over what the one before that read."""
    launches = 10
    x = torch.arange(blocks * 128 * 4, dtype=torch.int32).to(wrappers.device)
    y = torch.zeros_like(x)
    wanted = x.cpu() + launches
    wrappers.run("run_overlap", x, y, blocks, launches)
    assert torch.equal(x.cpu(), wanted)


def test_cp_async_writes_zeros_beyond_what_is_valid(wrappers: Wrappers) -> None:
    count = 32
    x = torch.randint(1, 255, (count, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(count, dtype=torch.int32) % 9 * 2
    wanted = torch.where(torch.arange(16) < valid[:, None], x, 0).to(torch.uint8)
    x, valid = x.to(wrappers.device), valid.to(wrappers.device)
    y = torch.full_like(x, 7)
    wrappers.run("run_cp_async", x, valid, y, count)
    assert torch.equal(y.cpu(), wanted)


def test_cp_async_under_a_predicate(wrappers: Wrappers) -> None:
    """What is not copied keeps what was there, the number of the thread; what is copied is all, or valid in part."""
    count = 64
    x = torch.randint(1000, 2000, (count, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    copies = torch.arange(count, dtype=torch.int32) % 3 % 2
    valid = torch.arange(count, dtype=torch.int32) % 5 * 4
    kept = torch.arange(count, dtype=torch.int32)[:, None]
    in_part = torch.where(torch.arange(4) * 4 < valid[:, None], x, 0)
    wanted = torch.cat([torch.where(copies[:, None] == 1, copied, kept) for copied in (x, in_part)])
    x, copies, valid = (one.to(wrappers.device) for one in (x, copies, valid))
    y = x.new_zeros(2 * count, 4)
    wrappers.run("run_cp_async_if", x, copies, valid, y, count)
    assert torch.equal(y.cpu(), wanted)


def test_an_address_a_product_further(wrappers: Wrappers) -> None:
    count = 64
    x = torch.randint(0, 255, (1 << 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    a, b = torch.arange(count, dtype=torch.int32), 1000 - torch.arange(count, dtype=torch.int32)
    wanted = x[(a * b).long()].int()
    x, a, b = (one.to(wrappers.device) for one in (x, a, b))
    y = torch.zeros_like(a)
    wrappers.run("run_product_after", x, a, b, y, count)
    assert torch.equal(y.cpu(), wanted)


def test_cp_async_groups_land_in_order(wrappers: Wrappers) -> None:
    x = torch.randint(0, 255, (128, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)).to(
        wrappers.device
    )
    y = torch.zeros_like(x)
    wrappers.run("run_cp_async_groups", x, y, 64)
    assert torch.equal(y, x)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(wrappers: Wrappers, transposed: bool) -> None:
    """Lane l gets of each matrix row l / 4, columns 2 (l % 4) and the next."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    x = matrices.to(wrappers.device)
    y = torch.full((32, 4), -1, dtype=torch.int32, device=wrappers.device)
    wrappers.run("run_ldmatrix", x, y, int(transposed))
    seen = matrices.transpose(1, 2) if transposed else matrices
    wanted = seen.reshape(4, 32, 2).transpose(0, 1).contiguous()  # [lane][matrix][two values]
    assert torch.equal(y.cpu().view(torch.int16).reshape(32, 4, 2), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_of_16_bits(wrappers: Wrappers, dtype: torch.dtype) -> None:
    a, b, d = (small_integers(*shape, seed=i) for i, shape in enumerate([(16, 16), (16, 8), (16, 8)]))
    sums = d.to(wrappers.device, copy=True)
    name = f"run_mma_{str(dtype).removeprefix('torch.')}"
    wrappers.run(name, a.to(wrappers.device, dtype), b.to(wrappers.device, dtype), sums)
    assert torch.equal(sums.cpu(), d + a @ b)


def test_mma_tf32(wrappers: Wrappers) -> None:
    a, b, d = (small_integers(*shape, seed=i) for i, shape in enumerate([(16, 8), (8, 8), (16, 8)]))
    sums = d.to(wrappers.device, copy=True)
    wrappers.run("run_mma_tf32", a.to(wrappers.device), b.to(wrappers.device), sums)
    assert torch.equal(sums.cpu(), d + a @ b)


def test_release_and_acquire(wrappers: Wrappers) -> None:
    """A block that acquired reads what another block wrote before it released."""
    blocks = 16
    counter, values, y = (torch.zeros(n, dtype=torch.int32, device=wrappers.device) for n in (1, blocks, blocks))
    wrappers.run("run_acquire", counter, values, y, blocks)
    assert int(counter) == blocks
    assert y.tolist() == [100 + (block + 1) % blocks for block in range(blocks)]


@pytest.mark.parametrize("cluster", [2, 4, 8, 16])
def test_clusters(wrappers: Wrappers, cluster: int) -> None:
    """cluster_rank counts along x, cluster_map reaches the other block's shared memory, cluster_sync orders both, as
    its two steps cluster_arrive and cluster_wait do.
    """
    if wrappers.device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    if wrappers.device.type == "cuda" and cluster > (largest := wrappers.limits(0)[-1]):
        pytest.skip(f"this GPU has clusters of up to {largest} blocks")
    blocks = 3 * cluster
    y = torch.zeros(blocks, 32, dtype=torch.int32, device=wrappers.device)
    wrappers.run("run_cluster", y, blocks, cluster)
    block = torch.arange(blocks)
    neighbour = block // cluster * cluster + (block % cluster + 1) % cluster
    assert torch.equal(y.cpu().long(), 1000 * neighbour[:, None] + torch.arange(32))


class TestLimits:
    def test_are_those_that_torch_reports(self, wrappers: Wrappers) -> None:
        if wrappers.device.type != "cuda":
            pytest.skip("needs a GPU")
        for device in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(device)
            capability, multiprocessors, shared, _, threads, _, registers, _ = wrappers.limits(device)
            assert capability == 10 * properties.major + properties.minor
            assert multiprocessors == properties.multi_processor_count
            assert threads == properties.max_threads_per_multi_processor
            assert shared == properties.shared_memory_per_multiprocessor
            assert registers == getattr(properties, "regs_per_multiprocessor", registers)

    def test_are_plausible(self, wrappers: Wrappers) -> None:
        capability, multiprocessors, shared, shared_block, threads, blocks, registers, cluster = wrappers.limits(0)
        assert capability >= 80
        assert multiprocessors > 0
        assert shared_block <= shared
        assert threads in (1536, 2048)
        assert blocks in (16, 24, 32)
        assert registers == 65536
        assert cluster == (1 if capability < 90 else 16 if capability < 110 else 8)


def test_every_wrapper_has_a_golden_test() -> None:
    """No function of ptx.cuh is left out of wrappers.cu."""
    names = _device_functions((ROOT / "csrc/cuda/ptx.cuh").read_text())
    used = (ROOT / "tests/gpu/wrappers.cu").read_text()
    assert [name for name in names if f"{name}(" not in used and f"{name}<" not in used] == []


def _device_functions(text: str) -> Sequence[str]:
    return sorted(set(re.findall(r"__device__ __forceinline__ [\w:]+\*? (\w+)[<(]", text)))

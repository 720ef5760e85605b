"""GPUs as their makers describe them: what launch plans and floor times are computed from.

Published figures, not measured ones: a copy reaches some 90 % of the published memory bandwidth. Per-multiprocessor
limits are those of the compute capability (CUDA C++ Programming Guide, "Compute Capabilities", table of technical
specifications); instruction rates are in the same guide ("Throughput of Native Arithmetic Instructions").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPECIAL_FUNCTIONS_PER_CLOCK = 16
"""Results per clock of one multiprocessor's special function units, for every capability from 8.0 to 12.0."""


@dataclass(frozen=True)
class Capability:
    """Limits that all GPUs of a compute capability share.

    Attributes:
        number: 10 * major + minor.
        shared_per_multiprocessor, shared_per_block: bytes of shared memory, and what one block may ask for at most.
        threads_per_multiprocessor, blocks_per_multiprocessor, registers_per_multiprocessor: resident at a time.
        largest_cluster: blocks, the sizes that a kernel must ask for included; 1 where there are no clusters.
    """

    number: int
    shared_per_multiprocessor: int
    shared_per_block: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    registers_per_multiprocessor: int
    largest_cluster: int


@dataclass(frozen=True)
class Gpu:
    """One model of a GPU.

    Attributes:
        name: what `find` knows it by.
        title: its full name, with the variant that the figures belong to.
        reported_names: what the driver calls it.
        capability: limits of its compute capability.
        multiprocessors: of them.
        bandwidth: of memory, bytes per second.
        memory: gigabytes, as sold.
        l2: bytes of level-2 cache.
        l2_bytes_per_clock: that it delivers to all multiprocessors. Published for the A100 alone (its architecture
            whitepaper); Hopper's are assumed to be the same, the others' are assumptions of half or less.
        clock: boost, Hz.
        tensor: bfloat16 and float16 matrix products with float32 sums, dense, floating-point operations per second.
        tf32: the same in TF32.
        float32: multiply-adds outside of the tensor cores, operations per second (two each).
        source: where the figures are published.
    """

    name: str
    title: str
    reported_names: tuple[str, ...]
    capability: Capability
    multiprocessors: int
    bandwidth: float
    memory: int
    l2: int
    l2_bytes_per_clock: int
    clock: float
    tensor: float
    tf32: float
    float32: float
    source: str

    @property
    def special_functions(self) -> float:
        """Special-function operations per second of the whole GPU."""
        return SPECIAL_FUNCTIONS_PER_CLOCK * self.multiprocessors * self.clock

    def limits(self) -> list[int]:
        """Return the limits that the compiled plans depend on, in the order of `torch.ops.effkernels.cuda_plan`."""
        of = self.capability
        return [
            of.number,
            self.multiprocessors,
            of.shared_per_multiprocessor,
            of.shared_per_block,
            of.threads_per_multiprocessor,
            of.blocks_per_multiprocessor,
            of.registers_per_multiprocessor,
            of.largest_cluster,
        ]


_KIB = 1024
_MIB = 1024 * 1024

_SM80 = Capability(80, 164 * _KIB, 163 * _KIB, 2048, 32, 65536, 1)
_SM89 = Capability(89, 100 * _KIB, 99 * _KIB, 1536, 24, 65536, 1)
_SM90 = Capability(90, 228 * _KIB, 227 * _KIB, 2048, 32, 65536, 16)
# Clusters of 8 are what the guide promises everywhere; 16 are documented for capability 9.0 alone.
_SM120 = Capability(120, 100 * _KIB, 99 * _KIB, 1536, 24, 65536, 8)

GPUS: tuple[Gpu, ...] = (
    Gpu(
        name="a100",
        title="NVIDIA A100 SXM4 80GB",
        reported_names=("NVIDIA A100-SXM4-80GB",),
        capability=_SM80,
        multiprocessors=108,
        bandwidth=2039e9,
        memory=80,
        l2=40 * _MIB,
        l2_bytes_per_clock=5120,
        clock=1410e6,
        tensor=312e12,
        tf32=156e12,
        float32=19.5e12,
        source="NVIDIA A100 datasheet (80GB SXM); multiprocessors, clock and cache: A100 architecture whitepaper, "
        "comparison of NVIDIA data center GPUs",
    ),
    Gpu(
        name="h100",
        title="NVIDIA H100 SXM5 80GB",
        reported_names=("NVIDIA H100 80GB HBM3",),
        capability=_SM90,
        multiprocessors=132,
        bandwidth=3350e9,
        memory=80,
        l2=50 * _MIB,
        l2_bytes_per_clock=5120,
        clock=1980e6,
        tensor=989.4e12,
        tf32=494.7e12,
        float32=66.9e12,
        source="NVIDIA H100 datasheet (SXM); multiprocessors, clock, cache and dense rates (those of the tensor cores "
        "at 1830 MHz): H100 architecture whitepaper, comparison with the A100",
    ),
    Gpu(
        name="h200",
        title="NVIDIA H200 SXM 141GB",
        reported_names=("NVIDIA H200",),
        capability=_SM90,
        multiprocessors=132,
        bandwidth=4800e9,
        memory=141,
        l2=60 * _MIB,
        l2_bytes_per_clock=5120,
        clock=1980e6,
        tensor=989.4e12,
        tf32=494.7e12,
        float32=66.9e12,
        source="NVIDIA H200 datasheet (SXM), whose rates are the H100's; multiprocessors and clock: as the H100's; "
        "cache: as the driver reports it",
    ),
    Gpu(
        name="l4",
        title="NVIDIA L4 24GB",
        reported_names=("NVIDIA L4",),
        capability=_SM89,
        multiprocessors=58,
        bandwidth=300e9,
        memory=24,
        l2=48 * _MIB,
        l2_bytes_per_clock=1024,
        clock=2040e6,
        tensor=121e12,
        tf32=60.5e12,
        float32=30.3e12,
        source="NVIDIA L4 datasheet, whose tensor rates are with sparsity, twice these; multiprocessors, clock and "
        "cache: Ada architecture whitepaper 2.01, appendix on the L4",
    ),
    Gpu(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090 24GB",
        reported_names=("NVIDIA GeForce RTX 4090",),
        capability=_SM89,
        multiprocessors=128,
        bandwidth=1008e9,
        memory=24,
        l2=72 * _MIB,
        l2_bytes_per_clock=2048,
        clock=2520e6,
        tensor=165.2e12,
        tf32=82.6e12,
        float32=82.6e12,
        source="Ada architecture whitepaper 2.01, appendix A, GeForce RTX 4090 (tensor rates with FP32 accumulate)",
    ),
    Gpu(
        name="rtx5090",
        title="NVIDIA GeForce RTX 5090 32GB",
        reported_names=("NVIDIA GeForce RTX 5090",),
        capability=_SM120,
        multiprocessors=170,
        bandwidth=1792e9,
        memory=32,
        l2=96 * _MIB,
        l2_bytes_per_clock=2560,
        clock=2407e6,
        tensor=209.5e12,
        tf32=104.8e12,
        float32=104.8e12,
        source="RTX Blackwell architecture whitepaper, appendix A, GeForce RTX 5090 (tensor rates with FP32 "
        "accumulate)",
    ),
)
DEFAULT_GPU = "h200"


def find(name: str) -> Gpu:
    """Return the GPU of that name; case, spaces and hyphens do not count.

    Raises:
        ValueError: there is no such GPU in the table; the message lists those that are.
    """
    wanted = name.lower().replace(" ", "").replace("-", "")
    for gpu in GPUS:
        if gpu.name == wanted:
            return gpu
    raise ValueError(f"{name!r} is not in the table of GPUs; allowed: {', '.join(gpu.name for gpu in GPUS)}")


def of_this_machine(index: int = 0) -> Gpu | None:
    """Return the table's entry for a GPU of this machine; None without a GPU or without an entry."""
    if not torch.cuda.is_available():
        return None
    reported = torch.cuda.get_device_properties(index).name
    matching = [gpu for gpu in GPUS if reported in gpu.reported_names]
    return matching[0] if matching else None

"""An estimate of the time of each planned launch, its terms apart: computed, never measured.

Every unit of a GPU takes some time for a launch: memory for its bytes, the schedulers for its instructions, and so on.
The launch takes the longest of these times, or the time that its blocks wait where too few warps hide that; fixed costs
come on top. A constant that is no published figure is an assumption, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor

from effkernels.plan import kernel_counts
from effkernels.plan.cut import WARP, Clocks, Cut, Work
from effkernels.plan.gpus import Gpu
from effkernels.plan.kernel_counts import Counters, KernelCounts
from effkernels.plan.queue_order import QueuedBlock, end_of_queue
from effkernels.plan.record import RecordedCall, tensors_in
from effkernels.plan.work import work_of

# Clocks of a multiprocessor for one instruction of a warp (CUDA C++ Programming Guide, "Throughput of Native Arithmetic
# Instructions": 4 schedulers, 128 results of float32 multiply-adds a clock, 64 of integer and bit operations and of
# conversions, 16 special functions; loads and stores: 32 addresses). The rates of 8.0 (64 float32 results) are in
# `_FMA_RESULTS`.
_ISSUE_CLOCKS = 1 / 4
_ALU_CLOCKS = WARP / 64
_SPECIAL_CLOCKS = WARP / 16
_MEMORY_CLOCKS = WARP / 32
_FMA_RESULTS = {80: 64}
_FMA_RESULTS_ELSEWHERE = 128
OPERATIONS_OF_PRODUCT = 4096  # of `Counters.tensor`

COPY_SHARE = 0.9
"""Of the published memory bandwidth that a copy reaches: 4.3 of 4.8 TB/s was measured on an H200, reads and writes."""

MMA_SHARE = {90: 0.63}
"""Of the published rate that mma.sync reaches: on Hopper 62 % (arXiv 2402.13499, which measures it against wgmma)."""

L2_SHARE_OF_INPUT = 0.5
"""Assumption: a tensor of at most this share of L2 is still there when the next launch reads it."""

L1_LATENCY, L2_LATENCY, MEMORY_LATENCY = 40.0, 270.0, 500.0
"""Assumption: clocks that a lone warp waits for a read from L1, L2 and memory, about what microbenchmarks of the H100
report (arXiv 2402.13499)."""

CLOCKS_PER_INSTRUCTION = 2.0
"""Assumption: a warp issues an instruction every other clock on average; dependent arithmetic takes 4 clocks."""

ARRIVAL_ROUND_TRIPS = 3.0
"""Assumption: a fence, an atomic operation and a second fence, each a round trip to L2."""

L2_BYTES_OF_MULTIPROCESSOR = 64
"""Bytes a clock between L2 and one multiprocessor (A100 architecture whitepaper; an assumption for the others)."""

GRAPH_GAP_US = 1.0
"""Assumption: from the end of a kernel in a CUDA graph to the first instruction of the next one."""

DEPENDENT_GAP_US = 0.5
"""Assumption: the same with programmatic dependent launch, which hides the start of the next kernel, and no more: every
kernel waits for the one ahead before it reads anything."""

EAGER_US = 5.0
"""Assumption: time of the host for one call of an operator in eager mode, which goes on while the GPU works."""

FOREIGN_US = 2.0
"""Assumption: the least time of a kernel of PyTorch's own, whose blocks are not known."""

MODES = ("graph", "graph with dependent launches", "eager")


@dataclass(frozen=True)
class TimeEstimate:
    """Terms of the time of one launch, in microseconds, without the gap before it.

    The longest of the first nine counts; the others are added to it.

    Attributes:
        dram: bytes that come from memory or go there.
        l2: bytes between L2 and the multiprocessors.
        l1: clocks of the path between a multiprocessor and its L1 cache and shared memory.
        issue: all instructions, at 4 a clock.
        fma, alu, special, tensor: instructions of one unit.
        latency: what a block waits for, times the waves of blocks.
        prologue: waits of the first blocks for parameters, before their first input is asked for.
        tail: the last, partial wave of blocks; of a queue, the end of it (`end_of_queue`).
        last: work of the block that arrives last: means and gate of squeeze-and-excitation.
        blocks: that a multiprocessor holds at a time; 0 where the kernel is PyTorch's.
        counted: whether instructions were counted; else their terms are 0.
    """

    dram: float = 0.0
    l2: float = 0.0
    l1: float = 0.0
    issue: float = 0.0
    fma: float = 0.0
    alu: float = 0.0
    special: float = 0.0
    tensor: float = 0.0
    latency: float = 0.0
    prologue: float = 0.0
    tail: float = 0.0
    last: float = 0.0
    blocks: int = 0
    counted: bool = False

    @property
    def longest(self) -> str:
        """The name of the term that counts."""
        return max(OVERLAPPING, key=lambda name: float(getattr(self, name)))

    @property
    def longest_us(self) -> float:
        """The term that counts."""
        return float(getattr(self, self.longest))

    @property
    def us(self) -> float:
        """The whole time."""
        return self.longest_us + self.prologue + self.tail + self.last


def forward_us(times: Iterable[TimeEstimate], mode: str) -> float:
    """Return the time of launches that follow each other, with the gaps between them, in microseconds.

    Args:
        times: in the order of the launches.
        mode: one of `MODES`.

    Raises:
        ValueError: an unknown mode.
    """
    if mode == "graph":
        return sum(GRAPH_GAP_US + time.us for time in times)
    if mode == "graph with dependent launches":
        return sum(DEPENDENT_GAP_US + time.us for time in times)
    if mode == "eager":
        end = 0.0
        for called, time in enumerate(times, start=1):
            end = max(end + GRAPH_GAP_US, called * EAGER_US) + time.us
        return end
    raise ValueError(f"mode={mode!r} is not known; allowed: {', '.join(MODES)}")


def one_after_the_other(times: Sequence[TimeEstimate]) -> TimeEstimate:
    """Return the time of one launch whose parts follow each other, each of them estimated as a launch.

    The terms are sums. The waits are those of whole parts, because no part overlaps another.
    """
    sums = {name: sum(float(getattr(time, name)) for time in times) for name in TERMS}
    sums["latency"] = sum(time.longest_us for time in times)
    counted = all(time.counted for time in times)
    return TimeEstimate(**sums, blocks=min(time.blocks for time in times), counted=counted)


TERMS = tuple(field.name for field in fields(TimeEstimate) if field.type == "float")
OVERLAPPING = TERMS[: TERMS.index("prologue")]


@dataclass(frozen=True)
class StackedBlock:
    """A block of a network among those of one launch: what `estimate` is given of it."""

    line: Mapping[str, str]
    call: RecordedCall
    moved: int


def estimate_stack(blocks: Sequence[StackedBlock], gpu: Gpu) -> TimeEstimate:
    """Return the time of a launch of several blocks of a network.

    The terms are sums, as of `one_after_the_other`; the tail of a queue is by how much all items end later.
    """
    times, queued = [], []
    for number, one in enumerate(blocks):
        line = {**one.line, "grid": one.line.get("items", one.line["grid"])}  # the grid of a queue is of all blocks
        line["follows"] = str(int(number > 0))
        time, items = _estimate(line, one.call, gpu, moved=one.moved, flops=one.call.flops, rate=gpu.tensor)
        times.append(time)
        if items is not None:
            # An item that expands asks whether the images that it reads are written.
            asked = L2_LATENCY * 1e6 / gpu.clock if number else 0.0
            queued.append(replace(items, expand=items.expand + asked))
    together = one_after_the_other(times)
    if not queued:
        return together
    end = end_of_queue(gpu.multiprocessors * together.blocks, *queued)
    return replace(together, tail=max(0.0, end - together.latency))


def resident_blocks(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """Return the number of blocks that a multiprocessor holds at a time, by registers, threads and shared memory.

    Args:
        registers: of a thread.
        shared_bytes: dynamic shared memory of a block; the system takes 1 KiB more.
    """
    of = gpu.capability
    warps = -(-threads // WARP)
    of_warp = -(-registers * WARP // 256) * 256
    by_registers = of.registers_per_multiprocessor // of_warp // warps if registers else of.blocks_per_multiprocessor
    by_shared = of.shared_per_multiprocessor // (shared_bytes + 1024)
    by_threads = of.threads_per_multiprocessor // (WARP * warps)
    return max(1, min(by_registers, by_shared, by_threads, of.blocks_per_multiprocessor))


def estimate(
    line: Mapping[str, str], call: RecordedCall, gpu: Gpu, *, moved: int, flops: int, rate: float,
    counts: Mapping[str, KernelCounts] | None = None,
) -> TimeEstimate:  # fmt: skip
    """Return the time of a launch.

    Args:
        line: the launch as `cuda_plan` describes it; of one of PyTorch's own only "kernel".
        call: that it belongs to.
        moved: bytes that it reads and writes, each once.
        flops, rate: floating-point operations, and those a second of the unit that does them.
        counts: instead of the counts that the package ships.
    """
    return _estimate(line, call, gpu, moved=moved, flops=flops, rate=rate, counts=counts)[0]


def _estimate(
    line: Mapping[str, str], call: RecordedCall, gpu: Gpu, *, moved: int, flops: int, rate: float,
    counts: Mapping[str, KernelCounts] | None = None,
) -> tuple[TimeEstimate, QueuedBlock | None]:  # fmt: skip
    """Return the same, and the items of a queue by themselves."""
    cached = [tensor for tensor in _images(line["kernel"], call) if tensor.nbytes <= L2_SHARE_OF_INPUT * gpu.l2]
    from_memory = max(0, moved - sum(tensor.nbytes for tensor in cached) - _read_from_l2(line, call, gpu))
    dram = 1e6 * from_memory / (COPY_SHARE * gpu.bandwidth)
    l2_rate = gpu.l2_bytes_per_clock * gpu.clock
    product = 1e6 * flops / rate
    if "grid" not in line:
        return TimeEstimate(dram=dram, l2=1e6 * moved / l2_rate, tensor=product, latency=FOREIGN_US), None
    counts = kernel_counts.shipped() if counts is None else counts
    variant = line.get("variant", "")
    known = counts.get(variant, KernelCounts(0, {}))
    x, y = (int(number) for number in line["block"].split(","))
    sizes = {name: int(value) for name, value in line.items() if value.isdigit() and name not in _NO_SIZES}
    items = {kind: _items(kind, line, sizes, counts, x * y) for kind in ITEMS if f"{kind}_variant" in line}
    cut = Cut(line["kernel"], int(line["grid"]), x * y, sizes, known, items)
    blocks = resident_blocks(gpu, known.registers, cut.threads, int(line["shared"]))
    work = work_of(cut, call)
    if work is None:
        return TimeEstimate(dram=dram, l2=1e6 * moved / l2_rate, fma=product, blocks=blocks), None
    read = call.arguments.get("x", call.results[0])
    input_latency = L2_LATENCY if any(tensor is read for tensor in cached) else MEMORY_LATENCY
    return _terms(work, cut, gpu, blocks, dram, l2_rate, input_latency)


# The kinds of items of a queue (csrc/cuda/mbconv_queue.cuh), as `cuda_plan` names them.
ITEMS = ("expand", "project")
_NO_SIZES = ("kernel", "grid", "block", "variant", "reason")


def _items(
    kind: str, line: Mapping[str, str], sizes: Mapping[str, int], counts: Mapping[str, KernelCounts], threads: int
) -> Cut:
    """Return the cut of the launch whose blocks are the items of a kind."""
    prefix, variant = f"{kind}_", line[f"{kind}_variant"]
    own = {name.removeprefix(prefix): value for name, value in sizes.items() if name.startswith(prefix)}
    known = counts.get(variant, KernelCounts(0, {}))
    return Cut(variant.partition("<")[0], own["grid"], threads, own, known)


def _read_from_l2(line: Mapping[str, str], call: RecordedCall, gpu: Gpu) -> int:
    """Return the bytes of scratch memory that a queue writes and reads again out of L2."""
    if "ahead" not in line:
        return 0
    batch, _, height, width = call.results[0].shape
    between = int(batch * call.arguments["weight"].shape[0] * height * width * call.dtype.itemsize)
    kept = L2_SHARE_OF_INPUT * gpu.l2
    if between <= kept:
        return 2 * between
    return between if between * (int(line["ahead"]) + 1) / int(line["units"]) <= kept else 0


def _images(kernel: str, call: RecordedCall) -> list[Tensor]:
    """Return the bytes that a launch reads of other launches' results, and the bytes that it writes."""
    if kernel in ("norm_act", "scale_by_gate"):  # in place
        return [call.results[0], call.results[0]]
    return list(tensors_in([call.arguments.get("x"), call.arguments.get("residual"), *call.results]))


def _terms(
    work: Work, cut: Cut, gpu: Gpu, blocks: int, dram: float, l2_rate: float, input_latency: float
) -> tuple[TimeEstimate, QueuedBlock | None]:
    clocks_per_us = gpu.clock / 1e6

    def us(chain: Clocks) -> float:
        waits = chain.inputs * input_latency + chain.parameters * L2_LATENCY
        waits += chain.arrivals * ARRIVAL_ROUND_TRIPS * L2_LATENCY + chain.cached * L1_LATENCY
        return (chain.issued * CLOCKS_PER_INSTRUCTION + waits) / clocks_per_us

    active = min(gpu.multiprocessors, cut.grid)
    own = _units(work.issued, gpu)
    of_units = {name: clocks / active / clocks_per_us for name, clocks in own.items()}
    l2 = max(1e6 * work.l2_bytes / l2_rate, work.l2_bytes / (L2_BYTES_OF_MULTIPROCESSOR * active) / clocks_per_us)
    chain = us(work.prologue) + us(work.body)
    prologue = us(replace(work.prologue, issued=0.0))
    slots = gpu.multiprocessors * blocks
    waves = max(1.0, cut.grid / slots)
    latency = waves * chain - prologue
    longest = max(dram, l2, latency, *of_units.values())
    block: QueuedBlock | None = None
    if work.queue is not None:
        # Items are slower than their chains by as much as the launch is; the last ones, beside which less runs, too.
        slower, queue = longest / latency if cut.grid > slots else 1.0, work.queue
        chains = (queue.start, queue.expand, queue.gate, queue.project_start, queue.project, queue.leave)
        block = QueuedBlock(queue.order, *(slower * us(one) for one in chains))
        tail = max(0.0, end_of_queue(slots, block) - longest)
    elif cut.grid <= slots:
        # The busiest multiprocessor has whole blocks.
        most = -(-cut.grid // active) * active / cut.grid
        tail = max(0.0, max(of_units.values()) * most - longest)
    else:
        part = waves - int(waves)
        tail = max(0.0, chain - longest * part / waves) if part > 0 else 0.0
    time = TimeEstimate(
        dram=dram, l2=l2, latency=latency, prologue=prologue, tail=tail, last=us(work.last),
        blocks=blocks, counted=True, **of_units,
    )  # fmt: skip
    return time, block


def _units(issued: Counters, gpu: Gpu) -> dict[str, float]:
    """Return the number of clocks that one multiprocessor would take for all instructions, by unit."""
    number = gpu.capability.number
    results = _FMA_RESULTS.get(number, _FMA_RESULTS_ELSEWHERE)
    operations = gpu.tensor * MMA_SHARE.get(number, 1.0) / (gpu.multiprocessors * gpu.clock)
    return {
        "l1": max(issued.memory * _MEMORY_CLOCKS, issued.wavefronts),
        "issue": issued.issued * _ISSUE_CLOCKS,
        "fma": issued.fma * WARP / results,
        "alu": issued.alu * _ALU_CLOCKS,
        "special": issued.special * _SPECIAL_CLOCKS,
        "tensor": issued.tensor * OPERATIONS_OF_PRODUCT / operations,
    }

"""Part `ops`: every operator call and block of EfficientNet-B0 and B4 by CUDA and Triton kernels, PyTorch,
torch.compile and cuDNN or cuBLAS.

The most important cases come first. Rows go to the results file of this device as they are measured; a table of ratios
and of shares of the copy bandwidth, which is measured in the same process, comes last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_check import blocks, measure, shapes
from benchmarks.gpu_check.blocks import Block
from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.measure import Refused
from benchmarks.gpu_check.results import Results
from benchmarks.gpu_check.shapes import Measurement
from effkernels.bench.timing import Row
from effkernels.ops.parity import full_float32

MODELS = ("efficientnet_b0", "efficientnet_b4")
BATCHES = (256, 1, 32)

# The last eleven blocks of B0, whose planes of 28x28 and less clusters hold, as one operator and one by one.
STACKED, FIRST_STAGE = "efficientnet_b0", 3
STACK_BATCHES = (1, 8, 32)

# Seconds that a case takes at first guess, and what each mode of torch.compile adds; afterwards the last ones are the
# guess.
_GUESS = 4.0
_COMPILE_GUESS = 8.0

_COLUMNS = {"triton": "effkernels-triton", "eager": "eager-channels-last", "compile": "compile",
            "autotune": "compile-max-autotune", "library": " alone", "apart": blocks.ONE_BY_ONE}  # fmt: skip


def table(groups: Sequence[Sequence[Row]]) -> str:
    """Return one line for each case: our time, its share of the copy bandwidth, and the others' times over ours.

    Ours is the compiled kernel; where there is none, Triton's, and then its own column is empty.
    """
    lines = [f"{'case':<52} {'us':>9} {'of copy':>8}" + "".join(f" {title:>8}" for title in _COLUMNS)]
    for rows in groups:
        ours = next((row for row in rows if row.contender.startswith("effkernels")), None)
        if ours is None:
            continue
        cells = []
        for name in _COLUMNS.values():
            found = next((row for row in rows if row is not ours and _is(row, name)), None)
            cells.append("" if found is None else f"{found.median_us / ours.median_us:.2f}x")
        share = f"{ours.floor_us / ours.median_us:.0%}" if ours.floor_us else ""
        lines.append(
            f"{ours.case:<52} {ours.median_us:>9.1f} {share:>8}" + "".join(f" {cell:>8}" for cell in cells).rstrip()
        )
    return "\n".join(lines)


def _is(row: Row, name: str) -> bool:
    contender = row.contender.removesuffix("-graph")
    return contender.endswith(name) if name.startswith((" ", "-")) else contender == name


@dataclass(frozen=True)
class BlockMeasurement:
    """One block to measure. torch.compile is worth its seconds there."""

    block: Block
    batch: int
    compiled: bool = True

    @property
    def title(self) -> str:
        """The measurement in words."""
        return self.block.case(self.batch)


AnyMeasurement = Measurement | BlockMeasurement


def cases(models: Sequence[str], batches: Sequence[int]) -> Iterator[AnyMeasurement]:
    """Everything there is to measure, the most important first.

    At each batch and of each network the operators and whole blocks take turns; the operators that a network does not
    call itself come last. Blocks that follow each other come first: a few seconds say whether one operator pays.
    """
    if STACKED in models:
        stack = blocks.stack_of(STACKED, FIRST_STAGE)
        yield from (BlockMeasurement(stack, batch, compiled=False) for batch in STACK_BATCHES)
    for batch in batches:
        for model in models:
            families: list[Sequence[AnyMeasurement]] = [shapes.of_family(model, op, batch) for op in shapes.FAMILIES]
            families.append([BlockMeasurement(block, batch) for block in blocks.blocks_of(model)])
            yield from shapes.in_turn(families)
    for batch in batches:
        for model in models:
            yield from shapes.in_turn([shapes.of_family(model, op, batch) for op in shapes.OTHERS])


def wanted(options: Options) -> dict[str, tuple[AnyMeasurement, torch.dtype]]:
    """The cases by name in their order; in a smoke test a small call of each operator, a block and a stack."""
    if options.smoke:
        chosen: list[AnyMeasurement] = [
            shapes.of_family(MODELS[0], op, 2)[-1] for op in (*shapes.FAMILIES, *shapes.OTHERS)
        ]
        chosen.append(BlockMeasurement(blocks.blocks_of(MODELS[0])[-1], 2))
        chosen.append(BlockMeasurement(blocks.stack_of(STACKED, FIRST_STAGE), 2))
    else:
        chosen = list(cases(MODELS, BATCHES))
    return {f"{one.title}, {dtype}": (one, getattr(torch, dtype)) for one in chosen for dtype in options.dtypes}


class Bench:
    """The cases of one process: their results file, the copy bandwidth, what a case takes."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.results = Results(options)
        self.bandwidth = measure.copy_bandwidth(self.device, 64 if options.smoke else 4096)
        self.guess, self.compile_guess = _GUESS, _COMPILE_GUESS

    def modes(self, one: AnyMeasurement) -> list[str | None]:
        """Return the modes of torch.compile that a case is compared with."""
        if self.options.smoke or not one.compiled:
            return []
        return [None, "max-autotune-no-cudagraphs"] if self.options.max_autotune else [None]

    def seconds(self, one: AnyMeasurement) -> float:
        """Return the seconds that a case takes."""
        return 0.0 if self.options.smoke else self.guess + len(self.modes(one)) * self.compile_guess

    def run(self, one: AnyMeasurement, dtype: torch.dtype) -> tuple[list[Row], list[Refused]]:
        """Measure a case and write its rows down."""
        begin = time.monotonic()
        modes = self.modes(one)
        with torch.inference_mode():
            if isinstance(one, BlockMeasurement):
                suite, name = "block", one.block.case(one.batch)
                size, measured, refused = blocks.measure_block(one.block, one.batch, dtype, self.device, modes)
            else:
                measured, refused = measure.measure(one.call, dtype, self.device, modes)
                suite, name, size = "op", str(one.call), one.call.bytes_moved(dtype)
        rows = measure.rows_of(
            measured, suite=suite, case=name, batch=one.batch, size=size, dtype=dtype,
            device_name=self.results.device_name, date=self.results.date, bandwidth=self.bandwidth,
        )  # fmt: skip
        self.results.add(rows)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        took = time.monotonic() - begin
        if modes:
            self.compile_guess = 0.5 * self.compile_guess + 0.5 * max(0.0, took - self.guess) / len(modes)
        else:
            self.guess = 0.5 * self.guess + 0.5 * took
        return rows, refused


def operators(options: Options) -> str:
    """Time the operators and blocks at the shapes of B0 and B4."""
    work = options.work("ops")
    torch.backends.cudnn.benchmark = True
    full_float32()  # float32 against float32 on both sides, where cuDNN takes TF32 for some numbers of channels
    bench = Bench(options)
    name = bench.results.device_name
    print(f"{name}: a copy moves {bench.bandwidth / 1e6:.2f} TB/s, counting bytes read and written", flush=True)
    groups: list[list[Row]] = []
    for step, (one, dtype) in work.steps(wanted(options), lambda step: bench.seconds(step[0])):
        rows, refused = bench.run(one, dtype)
        groups.append(rows)
        print(" | ".join(f"{r.contender} {r.median_us:.1f} us" for r in rows), f"  {one.title}", flush=True)
        for refusal in refused:
            print(f"  {refusal.contender}: {refusal.reason}", flush=True)
            if refusal.ours:
                work.wrong(step, f"{step}: {refusal.contender}: {refusal.reason}")
    print(table(groups))
    return work.end(f"{len(groups)} cases in {bench.results.file.name}")


if __name__ == "__main__":
    sys.exit(run_part(operators))

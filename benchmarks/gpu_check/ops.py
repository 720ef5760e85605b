"""Part `ops`: every operator call of EfficientNet-B0 and B4 by CUDA and Triton kernels, PyTorch, torch.compile and
cuDNN or cuBLAS.

The most important cases come first, and what does not fit the time is left out and listed. Rows go to the results file
of this device as they are measured; a table of ratios and shares of the copy bandwidth comes last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.gpu_check import measure, shapes
from benchmarks.gpu_check.common import Options, TimeBox, run_part
from benchmarks.gpu_check.results import results_file
from benchmarks.gpu_check.shapes import Measurement
from effkernels import benchmark, environment
from effkernels.benchmark import Row

# Seconds that a case takes at first guess, and what torch.compile adds; afterwards the last ones are the guess.
_GUESS = 4.0
_COMPILE_GUESS = 8.0


_COLUMNS = {"triton": "effkernels-triton", "eager": "eager-channels-last", "compile": "compile",
            "autotune": "compile-max-autotune", "library": " alone"}  # fmt: skip


def table(groups: Sequence[Sequence[Row]]) -> str:
    """One line for each case: our time, its share of the copy bandwidth, and the others' times over ours.

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
    return contender.endswith(name) if name.startswith(" ") else contender == name


def wanted(options: Options) -> list[Measurement]:
    """The measurements in their order; in a smoke test one small call of each operator at batch 2."""
    if options.smoke:
        smallest: dict[str, Measurement] = {}
        for one in shapes.measurements(["efficientnet_b0"], [2]):
            pixels = one.call.channels * one.call.plane[0] * one.call.plane[1]
            known = smallest.get(one.op)
            if known is None or pixels < known.call.channels * known.call.plane[0] * known.call.plane[1]:
                smallest[one.op] = one
        return list(smallest.values())
    return list(shapes.measurements(["efficientnet_b0", "efficientnet_b4"], [1, 32, 256]))


def compile_modes(one: Measurement, options: Options, box: TimeBox) -> list[str | None]:
    """The modes of torch.compile that a case is compared with."""
    if options.smoke or not one.compiled or not box.affords(f"torch.compile of {one.title}", 2 * _COMPILE_GUESS):
        return []
    return [None, "max-autotune-no-cudagraphs"] if options.max_autotune else [None]


def operators(options: Options) -> str:
    """Time the operators at the shapes of B0 and B4."""
    box = options.time_box
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    name, file, date = results_file(options)
    bandwidth = measure.copy_bandwidth(device, 64 if options.smoke else 4096)
    print(f"{name}: a copy moves {bandwidth / 1e6:.2f} TB/s, counting bytes read and written", flush=True)
    dtypes = [getattr(torch, dtype) for dtype in options.dtypes]
    groups: list[list[Row]] = []
    wrong: list[str] = []
    guess = _GUESS
    for one in wanted(options):
        for dtype in dtypes:
            what = f"{one.title}, batch {one.batch}, {str(dtype).removeprefix('torch.')}"
            if not box.affords(what, 1.5 * guess):
                continue
            begin = time.monotonic()
            with torch.inference_mode():
                modes = compile_modes(one, options, box)
                case = one.call.case(one.op, min(one.batch, 2))
                large, measured, refused = measure.measure(case, one.batch, dtype, device, modes)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows = measure.rows_of(large, measured, dtype=dtype, device_name=name, date=date, bandwidth=bandwidth)
            benchmark.append_rows(file, rows)
            groups.append(rows)
            print(" | ".join(f"{r.contender} {r.median_us:.1f} us" for r in rows), f"  {large.op} {large.shape}")
            for refusal in refused:
                print(f"  {refusal.contender}: {refusal.reason}", flush=True)
                if refusal.ours:
                    wrong.append(f"{large.op} {large.shape}: {refusal.reason}")
            if not modes:
                guess = 0.5 * guess + 0.5 * (time.monotonic() - begin)
    box.report()
    print(table(groups))
    assert not wrong, f"{len(wrong)} cases wrong, the first: {wrong[0]}"
    assert groups, "no time for a single case"
    return f"{len(groups)} cases, {len(box.left_out)} left out, rows in {environment.file_stem(name)}.jsonl"


if __name__ == "__main__":
    sys.exit(run_part(operators))

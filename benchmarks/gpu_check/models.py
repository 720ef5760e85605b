"""Part `models`: EfficientNet-B0 in bfloat16 against every contender, at batch 1, 256 and 32.

Every batch gets the contenders that are ready at once; those that compile join where there is time, at batch 1 first.
All contenders of a batch run in turns in one process.
"""

from __future__ import annotations

import sys
import time

import torch

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.results import results_file
from effkernels import benchmark, environment
from effkernels.benchmark import Row
from effkernels.contenders import CONTENDERS, Case
from effkernels.model_benchmark import Options as Measuring
from effkernels.model_benchmark import case_name, model_size, run_case

MODEL = "efficientnet_b0"
BATCHES = (1, 256, 32)
# Seconds at first guess: all contenders that are ready at once, and each one that compiles.
_READY = 25.0
_COMPILES = {"compile": 40.0, "compile-graph": 25.0, "compile-max-autotune": 150.0, "compile-max-autotune-graph": 60.0}


def contenders_for(device: str, seconds: float) -> list[str]:
    """The contenders of a device that fit into so much time, in their usual order."""
    left = seconds - _READY
    compiling = []
    for name, takes in _COMPILES.items():
        if left >= takes:
            compiling.append(name)
            left -= takes
    return [
        name
        for name, contender in CONTENDERS.items()
        if device in contender.devices and (name not in _COMPILES or name in compiling)
    ]


def table(rows: list[Row]) -> str:
    """One line per contender, one column per batch, in microseconds of a call."""
    batches = sorted({row.batch for row in rows})
    width = max(len(row.contender) for row in rows)
    lines = [" ".join(["".ljust(width), *(f"{f'batch {batch}':>12}" for batch in batches)])]
    for contender in dict.fromkeys(row.contender for row in rows):
        times = {row.batch: row.median_us for row in rows if row.contender == contender}
        cells = (f"{times[batch]:>12.1f}" if batch in times else " " * 12 for batch in batches)
        lines.append(" ".join([contender.ljust(width), *cells]).rstrip())
    return "\n".join(lines)


def models(options: Options) -> str:
    """Time EfficientNet-B0."""
    box = options.time_box
    name, file, date = results_file(options)
    batches = (1,) if options.smoke else BATCHES
    size = 32 if options.smoke else model_size(MODEL)
    measuring = Measuring(warmup=1, rounds=2 if options.smoke else 10, memory=False)
    rows: list[Row] = []
    for position, batch in enumerate(batches):
        case = Case(
            MODEL,
            size,
            batch,
            "bfloat16",
            options.device,
            torch.get_num_threads(),
            channels_last=options.device == "cuda",
        )
        what = f"{case_name(case)}, batch {batch}"
        if not box.affords(what, _READY):
            continue
        later = _READY * (len(batches) - position - 1)  # the other batches are not to go without
        names = contenders_for(options.device, 0.0 if options.smoke else box.left - later)
        if options.smoke:
            names = [name for name in names if name.startswith(("effkernels", "eager"))]
        left_out = [n for n in CONTENDERS if options.device in CONTENDERS[n].devices and n not in names]
        box.left_out += [f"{what}: {n}" for n in left_out]
        print(f"{what}: {', '.join(names)}", flush=True)
        begin = time.monotonic()
        found, refusals = run_case(case, names, measuring, date=date)
        benchmark.append_rows(file, found)
        rows += found
        for row in found:
            print(f"  {row.contender:<36} {row.median_us:>12.1f} us  {row.images_per_s:>10.0f} images/s")
        for refusal in refusals:
            print(f"  {refusal.contender}: {refusal.reason}")
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    box.report()
    assert rows, "no time for a single batch"
    print(table(rows))
    ours = [row for row in rows if row.contender.startswith("effkernels")]
    assert ours, "this package was not among the contenders that ran"
    return f"{len(rows)} rows, {len(box.left_out)} left out, in {environment.file_stem(name)}.jsonl"


if __name__ == "__main__":
    sys.exit(run_part(models))

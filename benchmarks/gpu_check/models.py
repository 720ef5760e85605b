"""Part `models`: EfficientNet-B0 and B4 in bfloat16 against eager PyTorch and torch.compile, at batch 1 and 256.

All contenders of a step run in turns in one process, so a step that adds a compiler times again what a step before it
timed: only times of one process and one date are compared. What is ready at once comes first, for both networks at both
batches, then what compiles, then what is tuned by measurement and captured in a CUDA graph.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_check.common import Options, run_part
from benchmarks.gpu_check.results import Results
from effkernels.bench.contenders import CONTENDERS, NetworkCase
from effkernels.bench.networks import Options as Measuring
from effkernels.bench.networks import Refusal, case_name, model_size, run_case
from effkernels.bench.timing import Row

MODELS = ("efficientnet_b0", "efficientnet_b4")
BATCHES = (1, 256)

# What each round adds to those before it, and the seconds below which it is not begun for a network at a batch.
READY = ("effkernels", "effkernels-graph", "engine", "eager-channels-last", "eager-channels-last-graph")
ROUNDS = {
    "ready at once": (READY, 15.0),
    "compile": (("compile",), 35.0),
    "max-autotune with graphs": (("compile-max-autotune-graph",), 90.0),
    "all contenders": (tuple(CONTENDERS), 120.0),
}


@dataclass(frozen=True)
class Step:
    """One run of contenders in turns.

    Attributes:
        contenders: by their names, in their usual order.
        seconds: below which it is not begun.
    """

    model: str
    batch: int
    contenders: tuple[str, ...]
    seconds: float


def plan(device: str, models: Sequence[str] = MODELS, batches: Sequence[int] = BATCHES) -> dict[str, Step]:
    """Return every step by name, in the order of what is most worth knowing."""
    steps: dict[str, Step] = {}
    wanted: set[str] = set()
    for title, (added, seconds) in ROUNDS.items():
        wanted |= set(added)
        names = tuple(name for name, c in CONTENDERS.items() if name in wanted and device in c.devices)
        for model in models:
            for batch in batches:
                steps[f"{model}, batch {batch}: {title}"] = Step(model, batch, names, seconds)
    return steps


def table(rows: Sequence[Row]) -> str:
    """One line per contender, one column per network and batch: microseconds of a call in the newest run of each."""
    newest: dict[tuple[str, int], str] = {}
    for row in rows:
        newest[row.case, row.batch] = max(row.date, newest.get((row.case, row.batch), ""))
    shown = [row for row in rows if row.date == newest[row.case, row.batch]]
    columns = sorted(newest)
    width = max(len(row.contender) for row in shown)
    titles = [f"{case.removeprefix('efficientnet_')} x{batch}" for case, batch in columns]
    lines = [" ".join(["us of a call".ljust(width), *(f"{title:>12}" for title in titles)])]
    for contender in dict.fromkeys(row.contender for row in shown):
        times = {(row.case, row.batch): row.median_us for row in shown if row.contender == contender}
        cells = (f"{times[column]:>12.1f}" if column in times else " " * 12 for column in columns)
        lines.append(" ".join([contender.ljust(width), *cells]).rstrip())
    return "\n".join(lines)


def models(options: Options) -> str:
    """Time EfficientNet-B0 and B4."""
    work = options.work("models")
    device = options.device
    # A compiler takes a minute on a CPU and has nothing to show there.
    steps = plan(device) if not options.smoke else _first_round(plan(device, MODELS[:1], (1,)))
    measuring = Measuring(warmup=1, rounds=2 if options.smoke else 8, memory=False)
    rows: list[Row] = []
    results = Results(options)
    for name, step in work.steps(steps, lambda step: 0.0 if options.smoke else step.seconds):
        size = 32 if options.smoke else model_size(step.model)
        case = NetworkCase(
            step.model, size, step.batch, "bfloat16", device, torch.get_num_threads(), channels_last=device == "cuda"
        )
        print(f"{name}: {', '.join(step.contenders)}", flush=True)
        begin = time.monotonic()
        results.restart()
        found, refusals = run_case(case, step.contenders, measuring, date=results.date)
        results.add(found)
        rows += found
        for row in found:
            print(f"  {row.contender:<36} {row.median_us:>12.1f} us  {row.images_per_s:>10.0f} images/s")
        for refusal in refusals:
            print(f"  {refusal.contender}: {refusal.reason}")
            if _is_ours(refusal):
                work.wrong(name, f"{case_name(case)}, batch {case.batch}: {refusal.contender}: {refusal.reason}")
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
        torch.cuda.empty_cache()
    if rows:
        print(table(rows))
    return work.end(f"{len(rows)} rows in {results.file.name}")


def _is_ours(refusal: Refusal) -> bool:
    """Return whether a refusal is a mistake of this package, and not a package of others that is missing."""
    if refusal.contender in ("engine", "optimized"):
        return not refusal.reason.startswith(("not available", "timm"))
    return refusal.contender.startswith("effkernels")


def _first_round(steps: dict[str, Step]) -> dict[str, Step]:
    first = next(iter(ROUNDS))
    return {name: step for name, step in steps.items() if name.endswith(first)}


if __name__ == "__main__":
    sys.exit(run_part(models))

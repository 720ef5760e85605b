"""Runs the benchmark suite and appends its rows to results/<device>.jsonl: ``python -m benchmarks.suite``.

Every row of one run carries the same date. Nothing else writes into results/; ``benchmarks/report.py`` makes tables
and plots of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from effkernels import console, environment
from effkernels.bench import timing
from effkernels.bench.contenders import CONTENDERS
from effkernels.bench.networks import Options, case_name, run_case, steps
from effkernels.bench.op_cases import CONTENDERS as CONTENDERS_OF_OPS
from effkernels.bench.op_cases import dtype_name, measure_op
from effkernels.bench.timing import Row
from effkernels.commands.common import UsageError, device_of, positive

RESULTS = Path(__file__).resolve().parent / "results"
SUITES = ("overhead", "op", "model")


class Suite:
    """One run of the suite on one device."""

    def __init__(self, device: torch.device, threads: int, options: Options, file: Path) -> None:
        self.device = device
        self.threads = threads
        self.options = options
        self.file = file
        self.date = timing.run_date()
        self.device_name = environment.device_name(device, threads)

    def _append(self, rows: Sequence[Row]) -> None:
        # At once, so that a run that is broken off keeps what it measured.
        timing.append_rows(self.file, rows)
        for row in rows:
            console.note(f"  {row.contender:<28} {row.median_us:>12.1f} us")

    def model(self) -> None:
        """Networks, with every contender of the device."""
        names = [
            name
            for name, contender in CONTENDERS.items()
            if self.device.type in contender.devices and name not in cases.LEFT_OUT[self.device.type]
        ]
        for case in cases.model_cases(self.device, self.threads):
            console.note(f"model {case_name(case)}, batch {case.batch}, {case.numbers.name}")
            with console.progress("suite", steps(names, self.options)) as advance:
                rows, refusals = run_case(case, names, self.options, date=self.date, advance=advance)
            self._append(rows)
            for refusal in refusals:
                console.note(f"  {refusal.contender}: {refusal.reason}")

    def op(self) -> None:
        """Operators, against plain PyTorch and torch.compile."""
        for batch in cases.OP_BATCHES[self.device.type]:
            for call in cases.op_calls(batch):
                for dtype in cases.OP_DTYPES[self.device.type]:
                    console.note(f"op {call}, {dtype_name(dtype)}")
                    rows, refusals = measure_op(
                        call, dtype, list(CONTENDERS_OF_OPS), self.device, self.options, threads=self.threads,
                        date=self.date,
                    )  # fmt: skip
                    self._append(rows)
                    for refusal in refusals:
                        console.note(f"  {refusal.contender}: {refusal.reason}")

    def overhead(self) -> None:
        """The cost of one call of an operator with next to no work."""
        console.note("overhead of one call")
        with torch.inference_mode():
            calls = cases.overhead_calls(self.device)
            times = timing.time_in_turns(
                {name: _ignoring_number(call) for name, call in calls.items()},
                device=self.device,
                warmup=100,
                rounds=self.options.rounds,
            )
        self._append(
            [
                timing.make_row(
                    timing.summarise(times[name]),
                    suite="overhead",
                    case="depthwise_bn_act 1x8x1x1 3x3 stride 1",
                    contender=name,
                    device=self.device_name,
                    dtype="float32",
                    batch=1,
                    date=self.date,
                )
                for name in calls
            ]
        )


def _ignoring_number(call: Callable[[], object]) -> timing.Run:
    return lambda number: call()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite", nargs="*", default=list(SUITES), help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: PyTorch's own number)")
    parser.add_argument("--warmup", type=positive, default=3, help="calls of each contender first (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=20, help="turns of each contender (%(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--results-folder", type=Path, default=RESULTS, help="default: benchmarks/results")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.suite if name not in SUITES]
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; allowed: {', '.join(SUITES)}")
    try:
        device = device_of(parsed.device)
    except UsageError as error:
        parser.error(str(error))
    threads = parsed.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    name = environment.device_name(device, threads)
    file = parsed.results_folder / f"{environment.file_stem(name)}.jsonl"
    options = Options(parsed.warmup, parsed.rounds, memory=not parsed.no_memory)
    suite: Any = Suite(device, threads, options, file)
    for wanted in parsed.suite:
        getattr(suite, wanted)()
    console.note(f"rows appended to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

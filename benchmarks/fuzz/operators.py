"""Operators on random arguments. Right calls are held against float64 by the project's tolerance rule; malformed ones
must raise an error that names the argument.

Every case runs in a child process, so that a crash is seen as the failure of its case and does not end the run.
``python -m benchmarks.fuzz.operators values SEED`` or ``... mistakes SEED`` repeats one case.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effkernels
from benchmarks.fuzz._operator_calls import RandomCall, available_isas, draw_call
from benchmarks.fuzz._operator_mistakes import check_mistake
from effkernels.ops.call import in_float64
from effkernels.ops.call import run as run_operator
from effkernels.ops.parity import Errors, errors

KINDS = ("values", "values", "mistakes")  # in turn
_ROOT = Path(__file__).resolve().parents[2]
_MOST_MEMORY = 16 << 30  # address space of the child: an absurd size is refused, and does not fill the machine
_MOST_SECONDS = 120.0  # of one case
# An output of few elements is judged by luck: draws are joined until there are this many, as in the tests.
_ENOUGH_ELEMENTS, _DRAWS, _SETS = 2048, 16, 4


def run(seconds: float, seed: int) -> list[str]:
    """Call operators for some seconds.

    Args:
        seconds: how long, from the first case on; the case in hand is finished.
        seed: of the run; each case has a seed of its own that follows from it.

    Returns:
        A line for each failure, with the command that repeats it.
    """
    rng = random.Random(seed)
    failures = []
    child = _Child()
    try:
        child.start()
        end = time.monotonic() + seconds
        number = 0
        while time.monotonic() < end:
            kind, case_seed = KINDS[number % len(KINDS)], rng.getrandbits(48)
            number += 1
            problem = child.check(kind, case_seed)
            if problem is not None:
                failures.append(f"python -m benchmarks.fuzz.operators {kind} {case_seed}: {problem}")
    finally:
        child.close()
    return failures


class _Child:
    """A process that checks cases; another one is started after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115

    def check(self, kind: str, seed: int) -> str | None:
        """Return what is wrong with a case; None if nothing is."""
        process = self._process or self.start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(f"{kind} {seed}\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], _MOST_SECONDS)
            answer = process.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = ""
        if answer:
            found: str | None = json.loads(answer)
            return found
        process.kill()
        status = process.wait()
        self._process = None
        if answer is None:
            return f"no answer after {_MOST_SECONDS:g} s"
        self._errors.seek(0)
        return f"the process died with status {status}: {self._errors.read()[:300].strip()}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def start(self) -> subprocess.Popen[str]:
        """Start the process and wait until it has imported everything."""
        self._errors.seek(0)
        self._errors.truncate()
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz.operators", "child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self._errors.seek(0)
            raise RuntimeError(f"the fuzzer's process does not start: {self._errors.read()[-1000:]}")
        return self._process


def check_values(seed: int) -> str | None:
    """Check that a valid call gives right values, the same twice and by any number of threads, and does not change
    its arguments; None, or what is wrong.
    """
    call = draw_call(seed, available_isas())
    torch.ops.effkernels.cpu_isa(call.isa)
    results, plain, truths = [], [], []
    for draw in range(_DRAWS):
        arguments = call.draw(seed + draw)
        before = {name: t.clone() for name, t in arguments.items() if isinstance(t, Tensor)}
        outputs = run_operator(effkernels.ops, call.op, arguments)
        if draw == 0:
            torch.set_num_threads(call.threads)
            again = run_operator(effkernels.ops, call.op, arguments)
            torch.set_num_threads(1)
            if not all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True)):
                return f"{call}: another result with {call.threads} threads"
        for name, t in before.items():
            if not torch.equal(arguments[name], t):
                return f"{call}: {name} was written to"
        for y in outputs:
            if y.dim() == 4 and y.stride() != torch.empty_like(y, memory_format=torch.channels_last).stride():
                return f"{call}: strides {y.stride()} of a result of shape {tuple(y.shape)}"
        results.append(outputs)
        plain.append(_plain(call, arguments))
        truths.append(_truth(call, arguments))
        if (draw + 1) * outputs[0].numel() >= _ENOUGH_ELEMENTS or outputs[0].numel() == 0:
            break
    for i in range(len(results[0])):
        mine, truth = _joined([r[i] for r in results]), _joined([t[i] for t in truths])
        if [r[i].shape for r in results] != [t[i].shape for t in truths]:
            return f"{call}: output {i} has shape {tuple(results[0][i].shape)}, expected {tuple(truths[0][i].shape)}"
        if not torch.isfinite(truth).all() or not torch.isfinite(_joined([p[0][i] for p in plain])).all():
            continue  # beyond the range of the dtype
        own = [errors(_joined([p[way][i] for p in plain]), truth) for way in range(len(plain[0]))]
        problem = _judge(mine, truth, own)
        if problem and mine.numel() < _ENOUGH_ELEMENTS:
            own += _further_errors(call, i, seed, len(results))
            problem = _judge(mine, truth, own)
        if problem:
            return f"{call}: output {i} {problem}"
    return None


def _plain(call: RandomCall, arguments: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """PyTorch's results in the same dtypes, which differ with the memory format of the images."""
    return [
        run_operator(effkernels.ops.reference, call.op, {name: _in_format(a, f) for name, a in arguments.items()})
        for f in (torch.channels_last, torch.contiguous_format)
    ]


def _in_format(argument: Any, memory_format: torch.memory_format) -> Any:
    is_image = isinstance(argument, Tensor) and argument.dim() == 4
    return argument.contiguous(memory_format=memory_format) if is_image else argument


def _truth(call: RandomCall, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return run_operator(effkernels.ops.reference, call.op, in_float64(arguments))


def _further_errors(call: RandomCall, output: int, seed: int, together: int) -> list[Errors]:
    """PyTorch's own errors in an output, for several sets of further draws."""
    found = []
    for first in range(seed + _DRAWS, seed + _DRAWS + _SETS * together, together):
        drawn = [call.draw(first + i) for i in range(together)]
        truth = _joined([_truth(call, arguments)[output] for arguments in drawn])
        plain = [_plain(call, arguments) for arguments in drawn]
        found += [errors(_joined([p[way][output] for p in plain]), truth) for way in range(len(plain[0]))]
    return found


def _judge(mine: Tensor, truth: Tensor, own: list[Errors]) -> str | None:
    """Return what exceeds twice PyTorch's own error in the same dtype plus one rounding (effkernels.ops.parity)."""
    found, one = errors(mine, truth), torch.finfo(mine.dtype).eps / 2
    for name, error, most in (
        ("l2", found.l2, max(e.l2 for e in own)),
        ("largest", found.largest, max(e.largest for e in own)),
    ):
        if not error <= 2 * most + one:
            return f"{name} error {error:.3g}, allowed {2 * most + one:.3g}"
    return None


def _joined(outputs: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in outputs])


def check(kind: str, seed: int) -> str | None:
    """Check one case in this process; None, or what is wrong."""
    torch.set_num_threads(1)
    try:
        return check_values(seed) if kind == "values" else check_mistake(seed)
    finally:
        torch.ops.effkernels.cpu_isa("auto")


def _serve() -> None:
    """Check the cases that stdin names, one a line, and answer each by a line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else writes to stdout
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        kind, seed = line.split()
        try:
            problem = check(kind, int(seed))
        except Exception as error:  # a call that had to succeed, or a fault of this module: its seed is a failure
            problem = f"{type(error).__name__}: {error}"
        answers.write(json.dumps(problem) + "\n")
        answers.flush()


def main() -> int:
    """Repeat one case, or serve a run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz.operators", description=__doc__)
    parser.add_argument("kind", choices=("values", "mistakes", "child"))
    parser.add_argument("seed", type=int, nargs="?", default=0)
    options = parser.parse_args()
    if options.kind == "child":
        _serve()
        return 0
    problem = check(options.kind, options.seed)
    print(problem or "as it should be")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())

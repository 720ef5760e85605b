"""Part `sanitizer`: compute-sanitizer over small calls of every operator.

A tool counts only where it also finds the mistake that tests/gpu/planted.cu has for it: on some machines it starts,
sees nothing, and reports no errors.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_check.common import ROOT, WORK, NotAvailable, Options, python, run_part, tool_output

PLANTED = ROOT / "tests" / "gpu" / "planted.cu"


@dataclass(frozen=True)
class Verdict:
    """The result of a run of a tool: the errors it counted, or None if it gave no account of the whole run."""

    errors: int | None
    line: str


def read_verdict(output: str) -> Verdict:
    """Reads the summary of a compute-sanitizer run; it prints one for each process."""
    errors: int | None = None
    lines = []
    pattern = r"^=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)$"
    for text, number in re.findall(pattern, output, flags=re.MULTILINE):
        errors = (errors or 0) + int(number)
        lines.append(text)
    refused = re.search(
        r"^=+ (?:Error|ERROR): .*|.*Device not supported.*|.*terminated before first instrumented.*",
        output,
        flags=re.MULTILINE,
    )
    if refused and not errors:
        return Verdict(None, refused[0].strip("= "))
    return Verdict(errors, "; ".join(lines) or "no summary")


def build_planted(nvcc: Path) -> Path:
    """Return the program with mistakes on purpose.

    Raises:
        NotAvailable: it cannot be built here.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    program = WORK / "planted"
    status, output = tool_output([nvcc, "-arch=native", "-o", program, PLANTED], 60)
    if status != 0:
        raise NotAvailable(f"{PLANTED.name} does not compile: {output.strip()[-200:]}")
    return program


def check(sanitizer: Path, tool: str, planted: Path, seconds: float, device: str = "cuda") -> str:
    """Try one tool on its planted mistake, then on the operators. Returns its summary line.

    Args:
        device: where the operators run; "cpu" in a dry run.

    Raises:
        NotAvailable: it does not find the mistake, or does not get through.
        AssertionError: it finds errors in the operators.
    """
    command: list[str | Path] = [sanitizer, "--tool", tool]
    _, output = tool_output([*command, planted, tool], 60)
    verdict = read_verdict(output)
    if not verdict.errors:
        raise NotAvailable(f"{tool} does not find a planted mistake here ({verdict.line})")
    calls = python("-m", "benchmarks.gpu_check.small_calls", device)
    # Every tensor an allocation of its own: inside of PyTorch's large ones nothing is out of bounds.
    status, output = tool_output([*command, *calls], seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    verdict = read_verdict(output)
    if verdict.errors is None:
        raise NotAvailable(f"{tool}: {verdict.line}")
    if verdict.errors or status != 0:
        print(output[-6000:])
    assert verdict.errors == 0, f"{tool}: {verdict.line}"
    assert status == 0, f"{tool}: the calls ended with exit status {status}"
    return f"{tool}: {verdict.line}"


def sanitizer(options: Options) -> str:
    """memcheck, racecheck and synccheck, each with what it found."""
    program = options.tool("compute-sanitizer")
    work = options.work("sanitizer")
    planted = build_planted(options.tool("nvcc"))
    works, absent = [], []
    tools = {tool: tool for tool in ("memcheck", "racecheck", "synccheck")}
    for step, tool in work.steps(tools, lambda tool: 12):
        try:
            works.append(check(program, tool, planted, work.left, options.device))
            print(works[-1], flush=True)
        except NotAvailable as reason:
            absent.append(str(reason))
            print(absent[-1], flush=True)
        except AssertionError as failure:
            work.wrong(step, str(failure))
    note = work.end("; ".join(works))
    if absent:
        raise NotAvailable("; ".join(absent + works))
    return note


if __name__ == "__main__":
    sys.exit(run_part(sanitizer))

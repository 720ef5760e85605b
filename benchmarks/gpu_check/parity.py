"""Part `parity`: the tests that run over every backend, with the backend `cuda`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from benchmarks.gpu_check.common import ROOT, NotAvailable, Options, environment, python, run_part

# Every test file that asks for the backend fixture, the most telling ones first.
FILES = (
    "tests/test_ops_parity.py",
    "tests/test_nn_blocks.py",
    "tests/test_models_parity.py",
    "tests/test_models_api.py",
    "tests/test_ops_compile.py",
)


def pytest_command(*arguments: str, processes: int) -> list[str]:
    """The command that runs pytest here, in ``processes`` processes where the machine has pytest-xdist.

    Raises:
        NotAvailable: this Python has no pytest or no hypothesis.
    """
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotAvailable(f"{sys.executable} has no {' and no '.join(missing)}")
    several = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *several, *arguments)


def run_pytest(*arguments: str, processes: int = 1) -> str:
    """Run tests; the note is pytest's last line.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    command = pytest_command(*arguments, processes=processes)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    counted = last.strip("= ")
    assert status == 0, f"{counted or 'no output'} (exit status {status})"
    assert " passed" in counted, f"no test ran: {counted}"
    return counted


def parity(options: Options) -> str:
    """Every operator, block and network on the device against float64."""
    if options.device == "cpu":
        return run_pytest(FILES[0], "-k", "test_squeeze_excite and cpu" if options.smoke else "cpu")
    return run_pytest(*FILES, "-k", "cuda and not emulated", processes=8)


if __name__ == "__main__":
    sys.exit(run_part(parity))

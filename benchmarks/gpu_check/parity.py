"""Part `parity`: the tests that run over every backend, with `cuda` and then with `triton`.

Triton compiles a kernel for nearly every test. Where the time ends before they do, they are stopped, and the note says
how many there were: not a failure, and not a claim either.
"""

from __future__ import annotations

import functools
import importlib.util
import signal
import subprocess
import sys
import threading

from benchmarks.gpu_check.common import ROOT, NotAvailable, Options, environment, python, run_part

# Every test file that asks for the backend fixture, the most telling ones first.
FILES = (
    "tests/test_ops_parity.py",
    "tests/test_ops_special_values.py",
    "tests/test_nn_blocks.py",
    "tests/test_models_parity.py",
    "tests/test_models_api.py",
    "tests/test_ops_compile.py",
    "tests/test_backends.py",
)

_SHORTEST = 20.0  # seconds: less is not worth the start of the tests


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


def run_pytest(*arguments: str, processes: int = 1, seconds: float | None = None) -> str:
    """Run tests; the note is pytest's last line.

    Args:
        seconds: stop after so long, which is no failure.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    command = pytest_command(*arguments, processes=processes)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1"},
        # A shell that starts something in the background has it ignore the signal that stops pytest below.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)  # on which pytest counts what it has

    alarm = threading.Timer(seconds or 0.0, stop)
    if seconds is not None:
        alarm.start()
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    alarm.cancel()
    return verdict(last.strip("= "), status, stopped.is_set())


def verdict(counted: str, status: int, stopped: bool) -> str:
    """The note on a run of pytest.

    Args:
        counted: its last line.
        stopped: it was interrupted for lack of time.

    Raises:
        AssertionError: a test failed, or none ran.
    """
    if stopped and " failed" not in counted and " error" not in counted:
        return f"{counted if ' passed' in counted else 'none passed'}, stopped for lack of time"
    assert status == 0, f"{counted or 'no output'} (exit status {status})"
    assert " passed" in counted, f"no test ran: {counted}"
    return counted


def parity(options: Options) -> str:
    """Every operator, block and network on the device against float64."""
    if options.device == "cpu":
        return run_pytest(FILES[0], "-k", "test_squeeze_excite and cpu" if options.smoke else "cpu")
    box = options.time_box
    compiled = run_pytest(*FILES, "-k", "cuda and not emulated", processes=8)
    if importlib.util.find_spec("triton") is None:
        return f"cuda: {compiled}; triton is not installed"
    if not box.affords("triton", _SHORTEST):
        return f"cuda: {compiled}; no time for triton"
    return f"cuda: {compiled}; triton: {run_pytest(*FILES, '-k', 'triton', processes=8, seconds=box.left)}"


if __name__ == "__main__":
    sys.exit(run_part(parity))

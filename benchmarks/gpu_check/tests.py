"""Runs tests as a part: within its time, and from where an earlier call was cut."""

from __future__ import annotations

import functools
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Mapping
from threading import Event, Timer

from benchmarks.gpu_check import resuming
from benchmarks.gpu_check.common import ROOT, WORK, Cut, NotAvailable, Options, environment, python
from benchmarks.gpu_check.progress import PartProgress, Progress

# Every test file that asks for the backend fixture, the most telling ones first.
FILES = (
    "tests/test_ops_parity.py",
    "tests/test_ops_mbconv_stack_parity.py",
    "tests/test_training_steps.py",
    "tests/test_training_vectors.py",
    "tests/test_training_triton.py",
    "tests/test_ops_special_values.py",
    "tests/test_ops_pooled_means.py",
    "tests/test_nn_blocks.py",
    "tests/test_models_parity.py",
    "tests/test_models_api.py",
    "tests/test_ops_compile.py",
    "tests/test_backends.py",
)

_CLOSING_SECONDS = 3.0  # from the interrupt to pytest's last line
_NO_TESTS_LEFT = 5  # pytest's exit status


def pytest_command(*arguments: str, processes: int) -> list[str]:
    """Return the command that runs pytest here, in ``processes`` processes where the machine has pytest-xdist.

    Raises:
        NotAvailable: this Python has no pytest or no hypothesis.
    """
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotAvailable(f"{sys.executable} has no {' and no '.join(missing)}")
    several = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    return python("-m", "pytest", "-q", "-p", "no:cacheprovider", *several, *arguments)


def run_tests(
    options: Options, part: str, *arguments: str, processes: int = 1, variables: Mapping[str, str] | None = None
) -> str:
    """Run tests; the note is pytest's last line.

    Args:
        part: under whose name the tests are written down.
        arguments: of pytest.
        variables: added to the environment.

    Raises:
        AssertionError: a test failed, now or in an earlier call, or none ran.
        Cut: the time was up.
        NotAvailable: there is no pytest.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    progress = options.progress if options.progress.file else Progress(WORK / f"{part}-tests.jsonl")
    if options.progress.file is None:
        progress.forget()
    before = progress.of(part)
    skip = WORK / f"{part}-done.txt"
    skip.write_text("\n".join([*before.done, *before.given_up]), encoding="utf-8")
    assert progress.file is not None
    command = pytest_command(*resuming.options(progress.file, part, skip), *arguments, processes=processes)
    last, status, stopped = _run(command, options.left - _CLOSING_SECONDS, variables or {})
    return verdict(last, status, stopped, progress.of(part))


def _run(command: list[str], seconds: float, variables: Mapping[str, str]) -> tuple[str, int, bool]:
    """Last line and exit status of pytest, and whether it was stopped after its time."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1", **variables},
        # A shell that starts something in the background has it ignore the signal that stops pytest below.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    stopped = Event()

    def stop() -> None:
        stopped.set()
        process.send_signal(signal.SIGINT)  # on which pytest counts what it has

    alarm = Timer(max(seconds, 0.0), stop)
    alarm.start()
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    status = process.wait()
    alarm.cancel()
    return last.strip("= "), status, stopped.is_set()


def verdict(counted: str, status: int, stopped: bool, state: PartProgress) -> str:
    """Return the note on a run of pytest.

    Args:
        counted: its last line.
        stopped: it was interrupted for lack of time.
        state: what the plugin wrote down, of earlier calls too.

    Raises:
        AssertionError: a test failed, or none ran.
        Cut: tests are left.
    """
    assert not state.wrong, f"{len(state.wrong)} of {len(state.done)} tests failed, the first: {state.wrong[0]}"
    if stopped and (state.left or not state.planned):
        raise Cut(f"{state.how_far()}; {counted}")
    ended_well = status == 0 or stopped or (status == _NO_TESTS_LEFT and state.done)
    assert ended_well, f"{counted or 'no output'} (exit status {status})"
    assert state.done, f"no test ran: {counted}"
    return f"{len(state.done)} tests; {counted}"

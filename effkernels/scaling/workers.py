"""Calls of one function on many arguments: in this process, in processes of their own, or as tasks of Ray.

`concurrent.futures` runs the processes, one executor for each. A call that raises, or whose process dies, is one result
among the others.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, TypeVar

import torch

BACKENDS: tuple[str, ...] = ("processes", "ray")
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one call.

    Attributes:
        values: the numbers that the function returned, {"accuracy": ...} for a bare number; None if it failed.
        error: the reason of a failure, in one line; None if there was none.
        seconds: duration of the call.
    """

    values: Mapping[str, float] | None
    error: str | None
    seconds: float


def outcome_of(function: Callable[[T], float | Mapping[str, float]], argument: T) -> Outcome:
    """Call a function and return its outcome, which holds whatever the function raises."""
    begin = time.perf_counter()
    try:
        values = as_values(function(argument))
    except Exception as error:  # a user's function may raise anything, and the other candidates are still wanted
        return Outcome(None, one_line(error), time.perf_counter() - begin)
    return Outcome(values, None, time.perf_counter() - begin)


def one_line(error: BaseException) -> str:
    """Return type, message and place of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def as_values(result: float | Mapping[str, float]) -> dict[str, float]:
    """Return the results of an evaluation as finite numbers by name, "accuracy" among them.

    Raises:
        ValueError: no "accuracy", or a value that is not finite.
    """
    values = (
        {str(k): float(v) for k, v in result.items()} if isinstance(result, Mapping) else {"accuracy": float(result)}
    )
    if "accuracy" not in values:
        raise ValueError(f"the evaluation returned {', '.join(values) or 'nothing'}; needed: accuracy")
    wrong = {name: value for name, value in values.items() if not abs(value) < float("inf")}
    if wrong:
        raise ValueError(f"the evaluation returned {wrong}; allowed: finite numbers")
    return values


class Workers:
    """Calls functions, several at a time. Use it as a context manager: its processes end with the block.

    Processes start when they are needed and serve all calls of the block. If the block ends by an exception, Ctrl-C
    included, the calls under way are cut off. The processes also end if this process is killed.

    Args:
        count: calls at a time; 1 calls in this process, so that a debugger works.
        threads: threads of PyTorch in each call; None: this process's, divided by `count`.
        backend: "processes" (spawned), or "ray" (tasks on the cluster that `ray.init` finds or starts).

    Raises:
        ValueError: count below 1 or an unknown backend.
    """

    def __init__(self, count: int = 1, threads: int | None = None, backend: str = "processes") -> None:
        if count < 1:
            raise ValueError(f"workers={count}; allowed: 1 or more")
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}; allowed: {', '.join(BACKENDS)}")
        self.count = count
        self._threads = threads or max(1, torch.get_num_threads() // count)
        self._backend = backend
        self._started: list[Executor] = []
        self._idle: list[Executor] = []
        # Nothing is sent. The workers read from it until this end closes, which the end of this process does too.
        self._open_end, self._kept_open = multiprocessing.Pipe(duplex=False)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._kept_open.close()
        for executor in self._started:
            executor.shutdown()
        self._kept_open.close()
        self._open_end.close()

    def run(
        self, function: Callable[[T], float | Mapping[str, float]], arguments: Sequence[T]
    ) -> Iterator[tuple[int, Outcome]]:
        """Call a function on every argument.

        Args:
            function: for more than one worker picklable: defined at the top of a module.
            arguments: picklable too.

        Yields:
            Index and outcome, in the order in which the calls finish.

        Raises:
            ModuleNotFoundError: "ray" is asked for and not installed.
        """
        if self.count == 1 and self._backend == "processes":
            for index, argument in enumerate(arguments):
                with _threads(self._threads):
                    outcome = outcome_of(function, argument)
                yield index, outcome
            return
        waiting = deque(enumerate(arguments))
        running: dict[Future[Outcome], tuple[int, Executor]] = {}
        while waiting or running:
            while waiting and len(running) < self.count:
                index, argument = waiting.popleft()
                future, executor = self._submit(function, argument)
                running[future] = index, executor
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index, executor = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Outcome(None, "its process died (killed, or out of memory)", 0.0)
                except Exception as error:  # cannot be pickled, or a failure of Ray's own
                    outcome = Outcome(None, one_line(error), 0.0)
                self._idle.append(executor)
                yield index, outcome

    def _submit(self, function: Callable[[T], Any], argument: T) -> tuple[Future[Outcome], Executor]:
        while self._idle:
            executor = self._idle.pop()
            with suppress(BrokenProcessPool):  # its process died in this call or the last
                return executor.submit(outcome_of, function, argument), executor
        executor = self._start()
        return executor.submit(outcome_of, function, argument), executor

    def _start(self) -> Executor:
        """Return an executor of one call at a time, so that a death has one call that it belongs to."""
        if self._backend == "ray":
            self._started.append(_RayTasks(self._threads))
        else:
            context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads and locks
            self._started.append(ProcessPoolExecutor(1, context, _prepare_process, (self._threads, self._open_end)))
        return self._started[-1]


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare_process(threads: int, open_end: Connection) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches all; the search ends its workers
    threading.Thread(target=_end_with_search, args=(open_end,), daemon=True).start()


def _end_with_search(open_end: Connection) -> None:
    with suppress(EOFError):
        open_end.recv()
    os._exit(1)


class _RayTasks(Executor):
    """Ray's tasks as futures. A Ray that runs already is used as it is; one started here ends with the search."""

    def __init__(self, threads: int) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("backend='ray' needs Ray: pip install ray") from error
        self._owns = not self._ray.is_initialized()
        if self._owns:
            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self._threads = threads
        # A task that died is a failed candidate, as it is with processes.
        self._remote = self._ray.remote(num_cpus=threads, max_retries=0)(_with_threads)

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """Start a task."""
        future: Future[Any] = self._remote.remote(self._threads, function, *arguments, **named).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the Ray that was started here."""
        if self._owns:
            self._ray.shutdown()


def _with_threads(threads: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments, **named)

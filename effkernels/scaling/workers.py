"""Calls of one function on many arguments: here, in processes of their own, or as tasks of Ray. Failures are results.

A search evaluates its candidates by this: one that raises, or whose process dies, is one result among the others.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

BACKENDS: tuple[str, ...] = ("processes", "ray")
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one call.

    Attributes:
        values: what the function returned, {"accuracy": ...} where it was a bare number; None if it failed.
        error: why it failed, in one line; None if it did not.
        seconds: it took.
    """

    values: Mapping[str, float] | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class Call(Generic[T]):
    """The function as a worker calls it, picklable if the function is."""

    function: Callable[[T], float | Mapping[str, float]]

    def __call__(self, argument: T) -> Outcome:
        """Call the function; the outcome holds whatever it raises."""
        begin = time.perf_counter()
        try:
            values = as_values(self.function(argument))
        except Exception as error:  # a user's function may raise anything, and the other candidates are still wanted
            return Outcome(None, one_line(error), time.perf_counter() - begin)
        return Outcome(values, None, time.perf_counter() - begin)


def one_line(error: BaseException) -> str:
    """Type, message and place of an error."""
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


def run_all(
    function: Callable[[T], float | Mapping[str, float]],
    arguments: Sequence[T],
    *,
    workers: int = 1,
    threads: int | None = None,
    backend: str = "processes",
) -> Iterator[tuple[int, Outcome]]:
    """Call a function on every argument.

    Args:
        function: for more than one worker picklable: defined at the top of a module.
        arguments: picklable too.
        workers: calls at a time; 1 calls in this process, so that a debugger works.
        threads: of PyTorch in each call; None: this process's, divided by the workers.
        backend: "processes" (spawned), or "ray" (tasks on the cluster that `ray.init` finds or starts).

    Yields:
        Index and outcome, in the order in which they finish.

    Raises:
        ValueError: workers below 1 or an unknown backend.
        ModuleNotFoundError: "ray" is asked for and not installed.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}; allowed: 1 or more")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; allowed: {', '.join(BACKENDS)}")
    call = Call(function)
    if backend == "processes" and (workers == 1 or len(arguments) < 2):
        for index, argument in enumerate(arguments):
            with _threads(threads):
                outcome = call(argument)
            yield index, outcome
        return
    threads = threads or max(1, torch.get_num_threads() // workers)
    waiting = list(range(len(arguments)))
    at_a_time = workers
    while waiting:
        broken = False
        with _executor(backend, at_a_time, threads) as executor:
            running: dict[Future[Outcome], int] = {}
            while running or (waiting and not broken):
                while waiting and not broken and len(running) < at_a_time:
                    index = waiting.pop(0)
                    running[executor.submit(call, arguments[index])] = index
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    index = running.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenProcessPool:
                        if at_a_time > 1:
                            waiting.append(index)  # whose process died is not known: all that ran are called again
                        else:
                            yield index, Outcome(None, "its process died (killed, or out of memory)", 0.0)
                        broken = True
                    except Exception as error:  # cannot be pickled, or a failure of Ray's own
                        yield index, Outcome(None, one_line(error), 0.0)
                    else:
                        yield index, outcome
        if broken:
            at_a_time = 1  # one at a time from here on: the next one that dies is known


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _executor(backend: str, workers: int, threads: int) -> Executor:
    if backend == "ray":
        return _RayExecutor(threads)
    context = multiprocessing.get_context("spawn")  # a fork would inherit PyTorch's threads and locks
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(threads,))


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A search that is killed must not leave workers that wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class _RayExecutor(Executor):
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
        # A task that died is a failed candidate, as it is in a pool of processes.
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

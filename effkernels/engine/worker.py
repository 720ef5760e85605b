"""A thread of an engine's own on a CPU: with its own number of PyTorch's threads, on cores of its own.

OpenMP keeps the number of threads, and the threads themselves, for each thread that calls it, and a new thread may run
on the cores of the one that starts it. So an engine that computes in a thread of its own shares neither with others.
"""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_Jobs = queue.SimpleQueue[tuple[Callable[[], Any], "Future[Any]"] | None]


class Worker:
    """Calls functions one after the other in its thread, in inference mode.

    Args:
        threads: how many of PyTorch's threads compute, the worker itself included.
        cores: CPU cores that all of them may run on; None: those of the process.

    Raises:
        OSError: the system does not let the thread run on those cores.
    """

    def __init__(self, threads: int, cores: tuple[int, ...] | None) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        # A daemon, so that it still works while the interpreter ends: an engine may answer until then.
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="effkernels-engine", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._jobs.put, None)
        before = torch.get_num_threads()
        try:
            self.run(lambda: _settle(threads, cores))
        except BaseException:
            self.close()
            raise
        finally:
            torch.set_num_threads(before)  # the worker's setting is also what PyTorch gives threads that start later

    def run(self, job: Callable[[], Result]) -> Result:
        """Return what `job` returns in the worker's thread, or raise what it raises."""
        if threading.current_thread() is self._thread:
            return job()
        done: Future[Result] = Future()
        self._jobs.put((job, done))
        return done.result()

    def close(self) -> None:
        """End the thread after the jobs that it has."""
        self._finalizer()


def _settle(threads: int, cores: tuple[int, ...] | None) -> None:
    if cores is not None:
        os.sched_setaffinity(0, cores)  # of this thread
    torch.set_num_threads(threads)
    torch.get_num_threads()  # a thread's first use takes the process's number, which is this one only now


def _work(jobs: _Jobs) -> None:
    while (found := jobs.get()) is not None:
        job, done = found
        try:
            with torch.inference_mode():
                done.set_result(job())
        except BaseException as error:
            done.set_exception(error)
        del found, job, done  # what they hold may be large, or the engine itself

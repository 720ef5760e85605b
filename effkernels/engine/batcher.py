"""Requests of many threads gathered into batches, under a limit on how long the first one waits."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

# Takes the requests of a batch; returns for each of them its answer, or the exception that it ends with.
Answer = Callable[[Sequence[Any]], Sequence[Any]]

LATENCIES_KEPT = 4096


class QueueFull(RuntimeError):
    """`submit` refused a request because as many are waiting as the engine is allowed to hold."""


@dataclass(frozen=True)
class RequestCounts:
    """Requests by what became of them; the attributes are those of `EngineStats`."""

    requests: int
    completed: int
    failed: int
    cancelled: int
    pending: int
    rejected: int
    latency_ms: tuple[float, float, float] | None


@dataclass(eq=False)
class _Request:
    content: Any
    answer: Answer
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class MicroBatcher:
    """A queue, and the thread that empties it.

    The thread takes a batch when `largest` requests wait or when the first of them has waited `max_latency_s`, calls
    their `answer` with all of them and resolves their futures. It starts with the first request. It holds on to whoever
    answers only while requests wait, so that an engine nobody refers to any more can go.

    Args:
        largest: requests in a batch.
        max_latency_s: how long the first request of a batch waits for others, in seconds.
        max_queue: requests that may wait at once.
    """

    def __init__(self, largest: int, max_latency_s: float, max_queue: int) -> None:
        self._largest = largest
        self._max_latency_s = max_latency_s
        self._max_queue = max_queue
        self._waiting: deque[_Request] = deque()
        # Reentrant (as Condition's own lock is): garbage collection may call close() in a thread that holds it.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process = os.getpid()
        self._requests = self._completed = self._failed = self._cancelled = self._rejected = 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def submit(self, content: Any, answer: Answer, block: bool = False) -> Future[Any]:
        """Queue a request.

        Args:
            content: what `answer` gets.
            block: wait for room in a full queue instead of raising.

        Raises:
            QueueFull: max_queue requests wait already.
            RuntimeError: closed.
        """
        request = _Request(content, answer)
        with self._changed:
            # The thread that empties the queue would wait for itself.
            block = block and not self.is_own_thread()
            while block and not self._closed and len(self._waiting) >= self._max_queue:
                self._changed.wait()
            self._refuse_if_closed()
            if len(self._waiting) >= self._max_queue:
                self._rejected += 1
                raise QueueFull(
                    f"submit: {len(self._waiting)} requests are waiting and max_queue={self._max_queue}; "
                    "try again later, or give block=True to wait for room"
                )
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="effkernels-engine", daemon=True)
                self._thread.start()
            self._requests += 1
            self._waiting.append(request)
            self._changed.notify_all()
        return request.future

    def refuse(self, error: Exception) -> Future[Any]:
        """A future that has failed already, counted as a request.

        Raises:
            RuntimeError: closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._refuse_if_closed()
            self._requests += 1
            self._failed += 1
        future.set_exception(error)
        return future

    def close(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Take no more requests. What waits is still answered, or cancelled with `cancel_futures`.

        Args:
            wait: return only when the thread is done.
        """
        if os.getpid() != self._process:
            return  # a child made by fork has neither the thread nor a say over its lock
        cancelled: list[_Request] = []
        with self._changed:
            self._closed = True
            if cancel_futures:
                cancelled = list(self._waiting)
                self._waiting.clear()
                self._cancelled += len(cancelled)
            self._changed.notify_all()
        for request in cancelled:  # without the lock: a future's callbacks run here
            request.future.cancel()
            request.future.set_running_or_notify_cancel()
        if wait and self._thread is not None and not self.is_own_thread():
            self._thread.join()

    def is_own_thread(self) -> bool:
        """Whether this is the thread that answers, in the callback of a future or in garbage collection."""
        return threading.current_thread() is self._thread

    def counts(self) -> RequestCounts:
        """What became of the requests so far."""
        with self._changed:
            latencies = torch.tensor(self._latencies, dtype=torch.float64) * 1e3
            counts = (self._requests, self._completed, self._failed, self._cancelled)
            rejected = self._rejected
        p50_p95_p99 = None
        if len(latencies) > 0:
            p50, p95, p99 = torch.quantile(latencies, torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
            p50_p95_p99 = (p50, p95, p99)
        return RequestCounts(*counts, pending=counts[0] - sum(counts[1:]), rejected=rejected, latency_ms=p50_p95_p99)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("submit: the engine is closed; it takes no more requests")

    def _work(self) -> None:
        while batch := self._next_batch():
            self._run(batch)
            batch.clear()  # nothing of the last batch may live on while this thread waits for the next

    def _next_batch(self) -> list[_Request]:
        """The requests to answer next, at least one; none when closed and empty."""
        batch: list[_Request] = []
        with self._changed:
            while not batch:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                until = self._waiting[0].arrived + self._max_latency_s
                while 0 < len(self._waiting) < self._largest and not self._closed:
                    remaining = until - time.monotonic()
                    if remaining <= 0:
                        break
                    self._changed.wait(remaining)
                while self._waiting and len(batch) < self._largest:
                    request = self._waiting.popleft()
                    if request.future.set_running_or_notify_cancel():
                        batch.append(request)
                    else:
                        self._cancelled += 1
                self._changed.notify_all()  # there is room again
        return batch

    def _run(self, batch: list[_Request]) -> None:
        try:
            answers = list(batch[0].answer([request.content for request in batch]))
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for a batch of {len(batch)} requests")
        except BaseException as error:  # whatever it is, it belongs to those who wait for it, and the thread lives on
            answers = [error] * len(batch)
        now = time.monotonic()
        failed = sum(isinstance(answer, BaseException) for answer in answers)
        with self._changed:  # counted first: who has an answer finds it in the counts
            self._failed += failed
            self._completed += len(batch) - failed
            self._latencies.extend(now - request.arrived for request in batch)
        for request, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                request.future.set_exception(answer)
            else:
                request.future.set_result(answer)

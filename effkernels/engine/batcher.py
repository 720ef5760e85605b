"""Requests of many threads gathered into batches, under a limit on how long the first one waits.

Nothing here is left locked or unanswered by an interrupt (KeyboardInterrupt may end any Python code of the main thread,
that of `threading.Condition`, `threading.Event` and `Thread.start` included). So locks are taken by `with` on a lock
that is written in C, between whose entering and whose block Python looks for no interrupt; who waits does so on a
`SimpleQueue` of its own, without a lock; and only the batcher's own thread, which gets no interrupts, does what has to
be done to the end.
"""

from __future__ import annotations

import _thread
import contextlib
import copy
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import torch

# Takes the requests of a batch; returns for each of them its answer, or the exception that it ends with.
Answer = Callable[[Sequence[Any]], Sequence[Any]]

LATENCIES_KEPT = 4096
_LONGEST_WAIT_S = 3600.0  # of one call into the system; who waits longer waits again
_LONGEST_UNRUNG_S = 1.0  # after which who waits for room looks for it: an interrupt of `close` may leave a bell unrung


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


class _FutureLock(_thread.RLock):  # type: ignore[misc, name-defined, unused-ignore]
    """Replaces a future's `threading.Condition`, which Python enters in steps, by a lock entered in C."""

    def __init__(self) -> None:
        self.bells: deque[SimpleQueue[None]] = deque()  # of those who wait for the future

    def notify_all(self) -> None:
        """Wake everybody who waits."""
        for bell in self.bells.copy():
            bell.put(None)

    def wait(self, timeout: float | None = None) -> bool:
        """Return at once: `RequestFuture` has waited before it took the lock."""
        return False


class RequestFuture(Future[Any]):
    """The future of a request: an interrupt of whoever waits for it leaves it as it was."""

    def __init__(self) -> None:
        super().__init__()
        self._condition: Any = _FutureLock()

    def result(self, timeout: float | None = None) -> Any:
        """See `concurrent.futures.Future.result`."""
        try:
            self._await(timeout)
            return super().result(0)
        finally:
            del self  # the exception's traceback would refer to this future, and this future to it

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """See `concurrent.futures.Future.exception`."""
        self._await(timeout)
        return super().exception(0)

    def _await(self, timeout: float | None) -> None:
        if self.done():
            return
        bell: SimpleQueue[None] = SimpleQueue()
        self._condition.bells.append(bell)
        try:
            until = None if timeout is None else time.monotonic() + timeout
            while not self.done() and (until is None or time.monotonic() < until):
                _wait_for(bell, until)
        finally:
            self._condition.bells.remove(bell)


def _wait_for(bell: SimpleQueue[None], until: float | None) -> None:
    """Wait until the bell rings, the clock shows `until`, or some time has passed."""
    left = _LONGEST_WAIT_S if until is None else until - time.monotonic()
    with contextlib.suppress(Empty):
        bell.get(timeout=min(max(left, 0.0), _LONGEST_WAIT_S))


@dataclass(eq=False)
class _Request:
    content: Any
    answer: Answer
    future: RequestFuture = field(default_factory=RequestFuture)
    arrived: float = field(default_factory=time.monotonic)


class _Worker:
    """The thread that answers: who it is, and when it is done."""

    def __init__(self) -> None:
        self.identity: int | None = None
        self.done = _thread.allocate_lock()  # held until the thread ends
        self.done.acquire()


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
        # Reentrant: garbage collection may call close() in a thread that holds it. Nobody waits while holding it.
        self._lock = threading.RLock()
        self._bell: SimpleQueue[None] = SimpleQueue()  # rings for the thread
        self._blocked: list[SimpleQueue[None]] = []  # bells of those who wait for room
        self._worker: _Worker | None = None
        self._closed = False
        self._process = os.getpid()
        # What became of requests is counted by the thread, or in one step.
        self._taken = self._completed = self._failed = self._cancelled = self._refused = self._rejected = 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)

    def submit(self, content: Any, answer: Answer, block: bool = False) -> Future[Any]:
        """Queue a request.

        Args:
            content: what `answer` gets.
            block: wait for room in a full queue instead of raising.

        Raises:
            QueueFull: max_queue requests wait already.
            RuntimeError: closed, or the system starts no thread.
        """
        request = _Request(content, answer)
        bell: SimpleQueue[None] = SimpleQueue()
        # The thread that empties the queue would wait for itself.
        block = block and not self.is_own_thread()
        while not self._queued(request, bell if block else None):
            _wait_for(bell, time.monotonic() + _LONGEST_UNRUNG_S)
        return request.future

    def _queued(self, request: _Request, bell: SimpleQueue[None] | None) -> bool:
        """Queue a request and return whether there was room; if not, `bell` gets an item when a retry may succeed."""
        with self._lock:
            self._refuse_if_closed()
            if len(self._waiting) < self._max_queue:
                self._start()
                self._ring()  # first: an interrupt before the next line wakes the thread for nothing
                self._waiting.append(request)
                return True
            if bell is None:
                self._rejected += 1
                raise QueueFull(
                    f"submit: {len(self._waiting)} requests are waiting and max_queue={self._max_queue}; "
                    "try again later, or give block=True to wait for room"
                )
            if bell not in self._blocked:
                self._blocked.append(bell)
            return False

    def _start(self) -> None:
        """Start the thread if there is none; with the lock held."""
        if self._worker is None:
            worker = _Worker()
            # Thread.start waits in Python for the thread to be there, and an interrupt there would hang the thread.
            _thread.start_new_thread(self._work, (worker,))
            self._worker = worker  # the thread does the same if an interrupt comes between the two

    def refuse(self, error: Exception) -> Future[Any]:
        """Return a future that has failed already, counted as a request.

        Raises:
            RuntimeError: closed.
        """
        future = RequestFuture()
        with self._lock:
            self._refuse_if_closed()
            self._refused += 1
        future.set_exception(error)
        return future

    def close(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """Take no more requests. What waits is still answered, or cancelled with `cancel_futures`.

        Args:
            wait: return only when the thread is done.
        """
        if os.getpid() != self._process:
            return  # a child made by fork has neither the thread nor a say over its lock
        with self._lock:
            self._closed = True
            worker = self._worker
            waiting = list(self._waiting)
            self._ring()
            self._let_in()
        if cancel_futures:
            for request in waiting:  # without the lock: callbacks run here. The thread counts them
                request.future.cancel()
        if wait and worker is not None and not self.is_own_thread():
            with worker.done:
                pass

    def is_own_thread(self) -> bool:
        """Return whether this is the thread that answers, in the callback of a future or in garbage collection."""
        worker = self._worker
        return worker is not None and worker.identity == _thread.get_ident()

    def counts(self) -> RequestCounts:
        """Return the counts of requests so far, by outcome."""
        with self._lock:
            latencies = torch.tensor(self._latencies, dtype=torch.float64) * 1e3
            completed, failed, cancelled = self._completed, self._failed + self._refused, self._cancelled
            requests = self._taken + self._refused + len(self._waiting)
            rejected = self._rejected
        p50_p95_p99 = None
        if len(latencies) > 0:
            p50, p95, p99 = torch.quantile(latencies, torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)).tolist()
            p50_p95_p99 = (p50, p95, p99)
        pending = requests - completed - failed - cancelled
        return RequestCounts(requests, completed, failed, cancelled, pending, rejected, p50_p95_p99)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("submit: the engine is closed; it takes no more requests")

    def _ring(self) -> None:
        """Wake the thread; with the lock held, so that it looks at the queue after what is done to it now."""
        if self._bell.empty():
            self._bell.put(None)

    def _let_in(self) -> None:
        """Wake everybody who waits for room; with the lock held."""
        blocked, self._blocked = self._blocked, []
        for bell in blocked:
            bell.put(None)

    # ------------------------------------------------------------------------------------------------- the thread

    def _work(self, worker: _Worker) -> None:
        """Run the thread. After any error it continues and fails only the requests that it holds."""
        worker.identity = _thread.get_ident()
        with self._lock:
            if self._worker is None:
                self._worker = worker
            mine = self._worker is worker
        try:
            batch: list[_Request] = []
            while mine:
                try:
                    if not self._take_batch(batch):
                        break
                    self._run(batch)
                except BaseException as error:
                    self._resolve(batch, [error] * len(batch))
                batch.clear()  # nothing of the last batch may live on while this thread waits for the next
        finally:
            worker.identity = None  # the system may give it to another thread
            worker.done.release()

    def _take_batch(self, batch: list[_Request]) -> bool:
        """Fill `batch` with the requests to answer next, at least one; False when closed and empty."""
        while True:
            with self._lock:
                until = self._until()
                if until is not None and until <= time.monotonic():
                    while self._waiting and len(batch) < self._largest:
                        request = self._waiting.popleft()
                        self._taken += 1
                        if _starts(request.future):
                            batch.append(request)
                        else:
                            self._cancelled += 1
                    self._let_in()
                    if batch:
                        return True
                    continue
                if self._closed and not self._waiting:
                    return False
            _wait_for(self._bell, until)

    def _until(self) -> float | None:
        """Return when the waiting requests become a batch; None without any."""
        if not self._waiting:
            return None
        is_ready = self._closed or len(self._waiting) >= self._largest
        return 0.0 if is_ready else self._waiting[0].arrived + self._max_latency_s

    def _run(self, batch: list[_Request]) -> None:
        try:
            answers = list(batch[0].answer([request.content for request in batch]))
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers for a batch of {len(batch)} requests")
        except BaseException as error:  # whatever it is, it belongs to those who wait for it, and the thread lives on
            answers = [error] * len(batch)
        self._resolve(batch, answers)

    def _resolve(self, batch: list[_Request], answers: Sequence[Any]) -> None:
        """Give every future its answer: one exception of many requests as an object of its own to each."""
        open_ones = [
            (request, answer) for request, answer in zip(batch, answers, strict=True) if not request.future.done()
        ]
        now = time.monotonic()
        failed = sum(isinstance(answer, BaseException) for _, answer in open_ones)
        with self._lock:  # counted first: who has an answer finds it in the counts
            self._failed += failed
            self._completed += len(open_ones) - failed
            self._latencies.extend(now - request.arrived for request, _ in open_ones)
        given: set[int] = set()
        for request, answer in open_ones:
            # A future that its owner has resolved, or a callback that ends in SystemExit, is nobody else's problem.
            with contextlib.suppress(BaseException):
                if not isinstance(answer, BaseException):
                    request.future.set_result(answer)
                    continue
                request.future.set_exception(_another(answer) if id(answer) in given else answer)
                given.add(id(answer))


def _starts(future: Future[Any]) -> bool:
    """Mark a future as running, unless it was cancelled, or resolved by whoever has it."""
    if future.done() and not future.cancelled():
        return False
    return future.set_running_or_notify_cancel()


def _another(error: BaseException) -> BaseException:
    """Return a copy of an exception, caused by it: an object that several threads raise is changed by all."""
    try:
        copied = copy.copy(error)
    except Exception:  # its class takes other arguments than it keeps
        copied = error
    if type(copied) is not type(error) or copied is error:
        copied = RuntimeError(f"{type(error).__name__}: {error}")
    copied.__cause__ = error
    return copied

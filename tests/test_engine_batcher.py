"""Requests of many threads as batches: the queue and its thread, without a model."""

from __future__ import annotations

import _thread
import gc
import signal
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any

import pytest

from effkernels.engine.batcher import MicroBatcher, QueueFull

# Against hangs alone: nothing here takes a noticeable part of it.
PATIENCE_S = 60
LONG_S = 600.0


class Doubling:
    """Answers a request with its double, remembers the batches, and holds the first one back until `go`."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Event(), threading.Event()
        if not held:
            self.go.set()

    def __call__(self, contents: Sequence[int]) -> list[Any]:
        self.batches.append(list(contents))
        self.started.set()
        assert self.go.wait(PATIENCE_S)
        return [2 * content for content in contents]


def occupied(batcher: MicroBatcher, answer: Doubling) -> Future[Any]:
    """Return a request that the thread is busy with until `answer.go`."""
    future = batcher.submit(-1, answer)
    assert answer.started.wait(PATIENCE_S)
    return future


def test_every_answer_belongs_to_its_question() -> None:
    answer = Doubling()
    batcher = MicroBatcher(16, 0.001, max_queue=10_000)
    with ThreadPoolExecutor(16) as pool:
        futures = list(pool.map(lambda number: batcher.submit(number, answer), range(800)))
    assert [future.result(PATIENCE_S) for future in futures] == [2 * number for number in range(800)]
    assert sorted(number for batch in answer.batches for number in batch) == list(range(800))
    assert max(map(len, answer.batches)) <= 16
    assert batcher._bell.qsize() <= 1, "what wakes the thread does not pile up"
    counts = batcher.counts()
    assert (counts.requests, counts.completed, counts.pending) == (800, 800, 0)
    assert counts.latency_ms is not None
    assert list(counts.latency_ms) == sorted(counts.latency_ms)
    batcher.close()


def test_a_full_batch_does_not_wait() -> None:
    batcher = MicroBatcher(4, LONG_S, max_queue=100)
    answer = Doubling()
    futures = [batcher.submit(number, answer) for number in range(8)]
    assert [future.result(PATIENCE_S) for future in futures] == [2 * number for number in range(8)]
    assert answer.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batcher.close()


def test_a_lone_request_waits_for_the_limit_only() -> None:
    batcher = MicroBatcher(1000, 0.01, max_queue=1000)
    assert batcher.submit(3, Doubling()).result(PATIENCE_S) == 6
    batcher.close()


def test_requests_that_arrive_meanwhile_go_together() -> None:
    batcher = MicroBatcher(4, 0.0, max_queue=100)
    answer = Doubling(held=True)
    first = occupied(batcher, answer)
    rest = [batcher.submit(number, answer) for number in range(4)]
    answer.go.set()
    assert [future.result(PATIENCE_S) for future in (first, *rest)] == [-2, 0, 2, 4, 6]
    assert answer.batches == [[-1], [0, 1, 2, 3]]
    batcher.close()


def test_a_failing_batch_fails_only_its_own_requests() -> None:
    def answer(contents: Sequence[int]) -> list[Any]:
        if 13 in contents:
            raise ZeroDivisionError("unlucky")
        return [KeyError("odd") if content % 2 else content for content in contents]

    batcher = MicroBatcher(2, LONG_S, max_queue=100)
    futures = [batcher.submit(number, answer) for number in (1, 2, 13, 4, 5, 6)]
    errors = [future.exception(PATIENCE_S) for future in futures]
    assert [type(error) for error in errors] == [
        KeyError, type(None), ZeroDivisionError, ZeroDivisionError, KeyError, type(None),
    ]  # fmt: skip
    assert futures[1].result() == 2
    counts = batcher.counts()
    assert (counts.completed, counts.failed) == (2, 4)
    batcher.close()


def test_too_few_answers_are_an_error() -> None:
    batcher = MicroBatcher(2, LONG_S, max_queue=100)
    futures = [batcher.submit(number, lambda contents: contents[:1]) for number in range(2)]
    for future in futures:
        with pytest.raises(RuntimeError, match="1 answers for a batch of 2"):
            future.result(PATIENCE_S)
    batcher.close()


class Odd(Exception):
    """Takes other arguments than it keeps, so that it cannot be copied."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize("error", [KeyError("odd"), Odd(1, 2), SystemExit(3)], ids=repr)
def test_every_future_has_an_exception_of_its_own(error: BaseException) -> None:
    def answer(contents: Sequence[int]) -> list[Any]:
        raise error

    batcher = MicroBatcher(3, LONG_S, max_queue=100)
    futures = [batcher.submit(number, answer) for number in range(3)]
    found = [future.exception(PATIENCE_S) for future in futures]
    assert len({id(one) for one in found}) == 3
    assert found[0] is error
    for one in found[1:]:
        assert one is not None
        assert one.__cause__ is error, "the traceback of the failure is not lost"
        assert str(error) in str(one)
        assert type(one) is (RuntimeError if isinstance(error, Odd) else type(error))
    batcher.close()


def test_the_thread_survives_whatever_a_request_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is no sequence, futures that were resolved by others, callbacks that exit, a broken clock."""

    def exits(future: Future[Any]) -> None:
        raise SystemExit

    batcher = MicroBatcher(2, 0.0, max_queue=100)
    held = Doubling(held=True)
    occupied(batcher, held)
    futures = [batcher.submit(number, held) for number in range(4)]
    futures[0].add_done_callback(exits)
    futures[3].set_running_or_notify_cancel()
    futures[3].set_result("by another")
    held.go.set()
    assert [future.result(PATIENCE_S) for future in futures] == [0, 2, 4, "by another"]
    with pytest.raises(TypeError, match="not iterable"):
        batcher.submit(1, lambda contents: None).result(PATIENCE_S)  # type: ignore[arg-type, return-value]

    clock, broken = time.monotonic, threading.Event()

    def monotonic() -> float:
        if threading.current_thread() is not threading.main_thread() and not broken.is_set():
            broken.set()
            raise OverflowError("the clock")
        return clock()

    monkeypatch.setattr("effkernels.engine.batcher.time.monotonic", monotonic)
    assert batcher.submit(5, Doubling()).result(PATIENCE_S) == 10
    assert broken.is_set()
    batcher.close()


def test_a_thread_that_cannot_start_is_an_error_of_that_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise RuntimeError("can't start new thread")

    batcher = MicroBatcher(2, 0.0, max_queue=1)
    with monkeypatch.context() as patch:
        patch.setattr("effkernels.engine.batcher._thread.start_new_thread", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                batcher.submit(1, Doubling())
        assert batcher.counts().requests == 0
        MicroBatcher(2, 0.0, max_queue=1).close()
    assert batcher.submit(1, Doubling()).result(PATIENCE_S) == 2
    batcher.close()


def test_an_interrupt_at_the_start_of_the_thread_leaves_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    start = _thread.start_new_thread

    def interrupted(*arguments: Any) -> int:
        start(*arguments)
        raise KeyboardInterrupt

    batcher = MicroBatcher(2, 0.0, max_queue=1)
    with monkeypatch.context() as patch:
        patch.setattr("effkernels.engine.batcher._thread.start_new_thread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batcher.submit(1, Doubling())
    assert batcher.submit(2, Doubling()).result(PATIENCE_S) == 4
    batcher.close()
    assert batcher.counts().requests == 1


@pytest.mark.parametrize("waits", ["result", "exception", "room", "close"])
def test_an_interrupt_of_who_waits_leaves_everything_free(waits: str) -> None:
    batcher = MicroBatcher(1, 0.0, max_queue=1)
    answer = Doubling(held=True)
    first = occupied(batcher, answer)
    waiting = batcher.submit(1, answer)
    wait_for: dict[str, Callable[[], Any]] = {
        "result": waiting.result,
        "exception": waiting.exception,
        "room": lambda: batcher.submit(2, answer, block=True),
        "close": batcher.close,
    }
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_for[waits]()
    finally:
        signal.signal(signal.SIGALRM, before)
    with ThreadPoolExecutor(1) as pool:
        counts = pool.submit(batcher.counts).result(PATIENCE_S)
        assert (counts.requests, counts.pending) == (2, 2)
        late = pool.submit(waiting.result)
        answer.go.set()
        assert late.result(PATIENCE_S) == 2
    assert first.result(PATIENCE_S) == -2
    batcher.close()


def test_futures_work_with_the_standard_library() -> None:
    batcher = MicroBatcher(4, 0.0, max_queue=100)
    answer = Doubling(held=True)
    futures = [batcher.submit(number, answer) for number in range(6)]
    with pytest.raises(TimeoutError):
        futures[0].result(0.01)
    with pytest.raises(TimeoutError):
        futures[0].exception(-1.0)
    done, not_done = wait(futures, timeout=0.01)
    assert (len(done), len(not_done)) == (0, 6)
    answer.go.set()
    assert sorted(future.result() for future in as_completed(futures, timeout=PATIENCE_S)) == [0, 2, 4, 6, 8, 10]
    done, not_done = wait(futures, timeout=PATIENCE_S)
    assert (len(done), len(not_done)) == (6, 0)
    assert "finished" in repr(futures[0])
    batcher.close()


def test_cancelled_requests_are_skipped() -> None:
    batcher = MicroBatcher(2, 0.0, max_queue=100)
    answer = Doubling(held=True)
    running = occupied(batcher, answer)
    futures = [batcher.submit(number, answer) for number in range(4)]
    assert not running.cancel()
    assert futures[1].cancel()
    answer.go.set()
    assert [futures[number].result(PATIENCE_S) for number in (0, 2, 3)] == [0, 4, 6]
    assert answer.batches == [[-1], [0, 2], [3]]
    batcher.close()
    counts = batcher.counts()
    assert (counts.cancelled, counts.pending, counts.completed) == (1, 0, 4)


def test_a_full_queue_refuses_or_blocks() -> None:
    batcher = MicroBatcher(1, 0.0, max_queue=2)
    answer = Doubling(held=True)
    first = occupied(batcher, answer)
    waiting = [batcher.submit(number, answer) for number in range(2)]
    with pytest.raises(QueueFull, match="2 requests are waiting and max_queue=2"):
        batcher.submit(9, answer)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(lambda: batcher.submit(7, answer, block=True).result(PATIENCE_S))
        answer.go.set()
        assert late.result(PATIENCE_S) == 14
    assert [future.result(PATIENCE_S) for future in (first, *waiting)] == [-2, 0, 2]
    assert batcher.counts().rejected == 1
    batcher.close()


def test_a_callback_may_submit() -> None:
    """It runs in the thread that answers, which must not wait for itself, not even with block=True."""
    batcher = MicroBatcher(1, 0.0, max_queue=1)
    answer, second, done = Doubling(), Future[Future[Any]](), threading.Event()

    def once_more(future: Future[Any]) -> None:
        second.set_result(batcher.submit(future.result(), answer, block=True))
        batcher.close()
        done.set()

    batcher.submit(5, answer).add_done_callback(once_more)
    assert second.result(PATIENCE_S).result(PATIENCE_S) == 20
    assert done.wait(PATIENCE_S)
    batcher.close()


def test_close_answers_what_waits() -> None:
    batcher = MicroBatcher(100, LONG_S, max_queue=100)
    futures = [batcher.submit(number, Doubling()) for number in range(5)]
    batcher.close()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(1, Doubling())


def test_close_can_cancel_what_waits() -> None:
    batcher = MicroBatcher(1, 0.0, max_queue=100)
    answer = Doubling(held=True)
    running = occupied(batcher, answer)
    waiting = [batcher.submit(number, answer) for number in range(3)]
    batcher.close(wait=False, cancel_futures=True)
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(PATIENCE_S)
    answer.go.set()
    assert running.result(PATIENCE_S) == -2
    batcher.close()
    assert batcher.counts().cancelled == 3


def test_close_wakes_who_waits_for_room() -> None:
    batcher = MicroBatcher(1, 0.0, max_queue=1)
    answer = Doubling(held=True)
    occupied(batcher, answer)
    batcher.submit(0, answer)
    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(batcher.submit, 1, answer, True)
        batcher.close(wait=False)
        with pytest.raises(RuntimeError, match="closed"):
            blocked.result(PATIENCE_S)
    answer.go.set()
    batcher.close()


def test_the_thread_lets_go_of_who_answered() -> None:
    batcher = MicroBatcher(1, 0.0, max_queue=1)
    answer = Doubling()
    kept = weakref.ref(answer)
    assert batcher.submit(1, answer).result(PATIENCE_S) == 2
    del answer
    deadline = time.monotonic() + PATIENCE_S
    while kept() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.001)
    assert kept() is None
    batcher.close()


def test_latencies_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effkernels.engine.batcher.LATENCIES_KEPT", 8)
    batcher = MicroBatcher(4, 0.0, max_queue=1000)
    futures = [batcher.submit(number, Doubling()) for number in range(100)]
    for future in futures:
        future.result(PATIENCE_S)
    batcher.close()
    assert len(batcher._latencies) == 8

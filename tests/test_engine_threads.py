"""Engines with threads and cores of their own."""

from __future__ import annotations

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_models import small_network

import effkernels

CORES = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
NAME = "effkernels-engine"
needs_affinity = pytest.mark.skipif(not CORES, reason="the system pins no threads: no os.sched_getaffinity")


class Noting(torch.nn.Module):
    """Passes images on, and notes in which thread, with how many of PyTorch's threads and on which cores."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, tuple[int, ...]]] = []
        self.scale = torch.nn.Parameter(torch.ones(()))

    def __deepcopy__(self, memo: Any) -> Noting:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cores = tuple(sorted(os.sched_getaffinity(0))) if CORES else ()
        self.seen.append((threading.current_thread().name, torch.get_num_threads(), cores))
        return x.mean((2, 3)) * self.scale


def test_engines_side_by_side_give_the_results_of_one() -> None:
    model, images = small_network(classes=0), torch.randn(3, 3, 32, 32)
    with effkernels.InferenceEngine(model, batch_sizes=(1, 4), input_size=32) as engine:
        wanted = engine(images)
    engines = [
        effkernels.InferenceEngine(model, batch_sizes=(1, 4), input_size=32, threads=threads) for threads in (1, 2, 3)
    ]
    with ThreadPoolExecutor(len(engines)) as pool:
        for results in pool.map(lambda one: [one(images) for _ in range(5)], engines):
            assert all(torch.equal(result, wanted) for result in results)
    answer = engines[0].submit(images[0]).result()
    assert torch.equal(answer, wanted[0])
    assert "threads of its own: 2" in str(engines[1].report)
    for engine in engines:
        engine.close()


@needs_affinity
def test_each_engine_has_its_threads_and_its_cores() -> None:
    before = torch.get_num_threads()
    for threads, count, cores in ((3, 3, CORES), (CORES[:1], 1, CORES[:1])):
        model = Noting()
        with effkernels.InferenceEngine(model, input_size=8, optimize=False, cuda_graph=False, threads=threads) as one:
            one(torch.zeros(2, 3, 8, 8))
            assert set(model.seen) == {(NAME, count, cores)}
            assert (one.report.threads, one.report.cores) == (count, None if isinstance(threads, int) else cores)
    assert torch.get_num_threads() == before
    assert tuple(sorted(os.sched_getaffinity(0))) == CORES
    later: list[int] = []
    started = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    started.start()
    started.join()
    assert later == [before]


def test_the_thread_ends_with_the_engine() -> None:
    engine = effkernels.InferenceEngine(Noting(), input_size=8, cuda_graph=False, threads=1)
    engine.close()
    dropped = effkernels.InferenceEngine(Noting(), input_size=8, cuda_graph=False, threads=1)
    del dropped
    gc.collect()
    end = time.monotonic() + 10
    while any(thread.name == NAME for thread in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert [thread for thread in threading.enumerate() if thread.name == NAME] == []


@pytest.mark.parametrize(
    ("threads", "error", "message"),
    [
        (0, ValueError, "threads=0; allowed: at least 1, or the numbers of cores"),
        (True, TypeError, r"threads=True; allowed: None, int, or the numbers of cores, such as \(0, 1\)"),
        ("2", TypeError, "threads='2'; allowed"),
        ((), ValueError, r"threads=\(\); allowed: one or more cores of this process, each once: \d"),
        ((10**6,), ValueError, r"threads=\(1000000,\); allowed: one or more cores of this process"),
    ],
)
def test_bad_threads_get_a_clear_error(threads: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        effkernels.InferenceEngine(Noting(), input_size=8, threads=threads)

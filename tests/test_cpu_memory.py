"""The pool that large CPU results live in: reused, bounded, given back, right from several threads and after a fork."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from effkernels import _library, ops

pytestmark = pytest.mark.skipif(not _library.is_loaded(), reason="the compiled library is not there")

GIGABYTE = 1 << 30
CHUNK = 32 << 20  # bytes the pool maps at least


def result(size: int = 64, fill: float = 1.0) -> Tensor:
    """A (1, 64, size, size) result, every element `fill`: at size 64 a megabyte, well above the smallest pooled one."""
    x = torch.full((1, 64, size, size), float(fill))
    return ops.pointwise_bn_act(x, torch.eye(64).view(64, 64, 1, 1))


def mapped() -> int:
    return int(torch.ops.effkernels.cpu_memory(-1))


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    torch.ops.effkernels.cpu_memory(0)
    torch.ops.effkernels.cpu_memory(GIGABYTE)
    yield
    torch.ops.effkernels.cpu_memory(GIGABYTE)


def test_memory_is_reused() -> None:
    before = mapped()
    first = result().data_ptr()
    assert mapped() == before + CHUNK
    for _ in range(50):
        y = result()
        assert y.data_ptr() == first
        assert y.data_ptr() % 64 == 0
        del y
    assert mapped() == before + CHUNK


def test_neighbours_join_when_freed() -> None:
    small = [result() for _ in range(28)]  # 28 MB of the 32 MB chunk
    before = mapped()
    start = min(y.data_ptr() for y in small)
    del small[::2]
    del small
    large = result(size=320)  # 26 MB: fits only where the freed blocks have become one
    assert large.data_ptr() == start
    assert mapped() == before


def test_limit_gives_unused_memory_back_and_keeps_what_is_in_use() -> None:
    before = mapped()
    kept, dropped = result(fill=3.0), result(size=512)
    assert mapped() > before + CHUNK
    del dropped
    assert torch.ops.effkernels.cpu_memory(0) == before + CHUNK
    assert torch.equal(kept, torch.full_like(kept, 3.0))
    del kept
    assert mapped() == before


def test_result_larger_than_the_limit_is_given_back_at_once() -> None:
    before = mapped()
    torch.ops.effkernels.cpu_memory(16 << 20)
    y = result(size=512)
    assert mapped() >= before + y.numel() * 4
    del y
    assert mapped() == before


def test_small_results_come_from_malloc() -> None:
    before = mapped()
    small = result(size=8)
    assert small.numel() * 4 < 64 * 1024
    assert mapped() == before


def test_result_is_an_ordinary_tensor() -> None:
    y = result(fill=2.0)
    view = y.permute(0, 2, 3, 1)[0, 3]
    address = y.data_ptr()
    del y
    other = result(fill=5.0)
    assert other.data_ptr() != address  # a view keeps the block
    assert torch.equal(view, torch.full_like(view, 2.0))
    other.mul_(2)
    assert torch.equal(other, torch.full_like(other, 10.0))


def test_many_threads() -> None:
    def work(fill: int) -> bool:
        held = [result(size=33 + fill % 5, fill=fill + i) for i in range(4)]
        return all(torch.equal(y, torch.full_like(y, fill + i)) for i, y in enumerate(held))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork() -> None:
    parent = result(fill=7.0)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's worker threads do not exist here
        right = torch.equal(parent, torch.full_like(parent, 7.0)) and torch.equal(result(), torch.ones(1, 64, 64, 64))
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(parent, torch.full_like(parent, 7.0))

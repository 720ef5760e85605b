"""The division of a batch: `buckets_for` against every other division."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkernels.engine import buckets_for


def cost(buckets: tuple[int, ...], overhead: float) -> float:
    return sum(buckets) + overhead * len(buckets)


def every_cut(count: int, sizes: list[int]) -> list[tuple[int, ...]]:
    """Return all multisets of sizes that hold count images and none of whose members could be left out."""
    found = []
    for length in range(count // min(sizes) + 2):
        for cut in itertools.combinations_with_replacement(sorted(sizes, reverse=True), length):
            if sum(cut) >= count and (not cut or sum(cut[:-1]) < count):
                found.append(cut)
    return found


@pytest.mark.parametrize(
    ("count", "overhead", "wanted"),
    [
        (0, 1, ()),
        (1, 1, (1,)),
        (2, 1, (1, 1)),
        (3, 1, (4,)),  # padding one image is cheaper than two more calls
        (17, 1, (16, 1)),
        (19, 1, (16, 4)),
        (64, 1, (64,)),
        (65, 1, (64, 1)),
        (130, 1, (64, 64, 1, 1)),
        (17, 16, (16, 1)),
        (40, 16, (64,)),  # where a call is dear, one larger bucket is better than three full ones
        (3, 0, (1, 1, 1)),  # where it is free, nothing is padded
    ],
)
def test_the_cheapest_cut(count: int, overhead: float, wanted: tuple[int, ...]) -> None:
    assert buckets_for(count, (1, 4, 16, 64), overhead) == wanted


def test_smaller_buckets_may_fit_better_than_the_largest() -> None:
    """If no size divides the next, filling the largest first would pad."""
    assert buckets_for(12, (4, 5), 0) == (4, 4, 4)
    assert buckets_for(24, (6, 7), 0) == (6, 6, 6, 6)


@given(
    st.integers(0, 14),
    st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True),
    st.sampled_from([0.0, 0.5, 1.0, 7.0]),
)
def test_no_other_cut_is_cheaper(count: int, sizes: list[int], overhead: float) -> None:
    found = buckets_for(count, sizes, overhead)
    assert sum(found) >= count
    assert set(found) <= set(sizes)
    assert list(found) == sorted(found, reverse=True)
    assert cost(found, overhead) == min(cost(cut, overhead) for cut in every_cut(count, sizes))


@given(st.integers(0, 2_000), st.sampled_from([(1, 4, 16, 64), (3, 7), (8,), (5, 6, 9)]), st.sampled_from([0.0, 12.0]))
def test_beyond_some_size_only_largest_buckets_are_added(count: int, sizes: tuple[int, ...], overhead: float) -> None:
    count += max(sizes) ** 2
    assert buckets_for(count + max(sizes), sizes, overhead) == (max(sizes), *buckets_for(count, sizes, overhead))


@pytest.mark.parametrize(
    ("count", "sizes", "error", "message"),
    [
        (-1, (1,), ValueError, "count=-1"),
        (1, (), ValueError, "at least one"),
        (1, (0, 4), ValueError, "0 is not allowed; each must be at least 1"),
        (1, (2.0,), TypeError, r"2\.0 is float; allowed: int"),
        (1, (True,), TypeError, "True is bool"),
    ],
)
def test_bad_arguments_are_named(count: int, sizes: tuple[int, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        buckets_for(count, sizes)

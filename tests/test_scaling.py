"""Compound scaling gives the paper's numbers, and rounds as the released models do."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkernels.models import BASELINE
from effkernels.models.peers import import_lukemelas
from effkernels.scaling import EFFICIENTNET, PUBLISHED, CompoundScaling, round_filters, round_repeats

VARIANTS = sorted(PUBLISHED)


def test_the_papers_coefficients_double_the_flops_with_phi() -> None:
    assert (EFFICIENTNET.alpha, EFFICIENTNET.beta, EFFICIENTNET.gamma) == (1.2, 1.1, 1.15)
    assert EFFICIENTNET.flops(1) == pytest.approx(2, rel=0.05)
    assert EFFICIENTNET.flops(3) == pytest.approx(EFFICIENTNET.flops(1) ** 3)
    assert EFFICIENTNET.flops(0) == EFFICIENTNET.depth(0) == EFFICIENTNET.width(0) == EFFICIENTNET.resolution(0) == 1


@given(phi=st.floats(-2, 8), alpha=st.floats(1, 2), beta=st.floats(1, 2), gamma=st.floats(1, 2))
def test_equation_3(phi: float, alpha: float, beta: float, gamma: float) -> None:
    scaling = CompoundScaling(alpha, beta, gamma)
    assert scaling.depth(phi) == pytest.approx(alpha**phi)
    assert scaling.width(phi) == pytest.approx(beta**phi)
    assert scaling.resolution(phi) == pytest.approx(gamma**phi)
    expected = scaling.depth(phi) * scaling.width(phi) ** 2 * scaling.resolution(phi) ** 2
    assert scaling.flops(phi) == pytest.approx(expected)


@given(filters=st.integers(1, 4096), width=st.floats(0.1, 8), divisor=st.sampled_from([1, 4, 8, 16]))
def test_channels_round_to_the_divisor_and_lose_at_most_a_tenth(filters: int, width: float, divisor: int) -> None:
    rounded = round_filters(filters, width, divisor)
    assert rounded % divisor == 0
    assert rounded >= divisor
    assert rounded >= 0.9 * filters * width
    assert rounded <= max(divisor, filters * width + divisor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_is_that_of_the_released_models(variant: str) -> None:
    import_lukemelas()
    from efficientnet_pytorch import utils

    width, depth, resolution, dropout = utils.efficientnet_params(f"efficientnet-{variant}")
    published = PUBLISHED[variant]
    assert (published.width, published.depth, published.resolution, published.dropout) == (
        width,
        depth,
        resolution,
        dropout,
    )
    options = utils.efficientnet(width, depth, resolution, dropout)[1]
    for stage in BASELINE.stages:
        assert round_filters(stage.channels, width) == utils.round_filters(stage.channels, options)
        assert round_repeats(stage.layers, depth) == utils.round_repeats(stage.layers, options)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta=0\.9 must be finite and at least 1"):
        CompoundScaling(1.2, 0.9, 1.15)
    with pytest.raises(ValueError, match="alpha=nan"):
        CompoundScaling(math.nan, 1.1, 1.15)
    with pytest.raises(ValueError, match="filters=0"):
        round_filters(0, 1.0)
    with pytest.raises(ValueError, match="depth=-1"):
        round_repeats(2, -1)

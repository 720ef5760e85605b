"""Scaling to a latency: the largest network within it, planned as `explain` plans, measured as the benchmarks do."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import search_evaluations as evaluations
from search_evaluations import TINY

from effkernels.cli import main
from effkernels.plan.launches import plan_model
from effkernels.scaling import (
    EFFICIENTNET,
    EFFICIENTNET_B0,
    CompoundScaling,
    MeasuredLatency,
    Network,
    PlannedLatency,
    fit_latency,
    scale,
    search,
)
from effkernels.scaling.digits import DIGITS_ROUNDING
from effkernels.scaling.latency import ALONE, Remembered


@dataclass
class ByFlops:
    """A machine that does a million multiply-adds in a millisecond, and how often it was asked."""

    calls: int = 0
    is_measured: bool = False
    description: str = "a million multiply-adds in a millisecond"

    def __call__(self, network: Network) -> float:
        self.calls += 1
        return network.cost().multiply_adds / 1e6


BASE_MS = TINY.cost().multiply_adds / 1e6


class TestFit:
    @pytest.mark.parametrize(
        ("factor", "way"),
        [(0.7, EFFICIENTNET), (1.0, EFFICIENTNET), (3.0, EFFICIENTNET), *((2.5, way) for way in ALONE.values())],
    )
    def test_is_within_the_budget_and_the_next_is_not(self, factor: float, way: CompoundScaling) -> None:
        budget = BASE_MS * factor
        fit = fit_latency(TINY, budget, latency=ByFlops(), scaling=way, rounding=DIGITS_ROUNDING, tolerance=0.01)
        assert fit.network.cost() == fit.cost
        assert fit.latency_ms == fit.cost.multiply_adds / 1e6 <= budget
        assert budget < fit.next_ms
        further = scale(TINY, fit.phi + 0.011, scaling=way, rounding=DIGITS_ROUNDING)
        assert further.cost().multiply_adds / 1e6 > budget
        assert fit.network == scale(TINY, fit.phi, scaling=way, rounding=DIGITS_ROUNDING)

    def test_free_dimensions_fit_at_least_as_much_as_any_way(self) -> None:
        latency = Remembered(ByFlops())
        budget = 3.3 * BASE_MS
        free = fit_latency(TINY, budget, latency=latency, scaling=None, rounding=DIGITS_ROUNDING, grid=0.25)
        assert free.latency_ms <= budget
        for way in (CompoundScaling(2.0, 1.0, 1.0), CompoundScaling(1.25, 1.25, 1.0)):
            alone = fit_latency(TINY, budget, latency=latency, scaling=way, rounding=DIGITS_ROUNDING)
            assert free.cost.multiply_adds >= alone.cost.multiply_adds

    def test_every_network_is_measured_once(self) -> None:
        counting = ByFlops()
        latency = Remembered(counting)
        for _ in range(2):
            fit_latency(TINY, 3 * BASE_MS, latency=latency, rounding=DIGITS_ROUNDING)
        assert counting.calls == len(latency.known)

    @pytest.mark.parametrize(
        ("budget", "arguments", "message"),
        [
            (0.0, {}, "budget_ms=0"),
            (1.0, {"tolerance": 0.0}, "tolerance=0"),
            (1.0, {"scaling": CompoundScaling(1, 1, 1)}, "does not grow"),
            (1e-6, {}, "out of reach"),
            (1e9, {"scaling": ALONE["resolution"]}, "stays within"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, budget: float, arguments: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_latency(TINY, budget, latency=ByFlops(), **arguments)  # type: ignore[arg-type]


class TestLatencies:
    @pytest.mark.usefixtures("compiled")
    @pytest.mark.parametrize("batch_size", [1, 32])
    def test_planned_is_the_sum_of_the_planned_floors(self, batch_size: int) -> None:
        latency = PlannedLatency("h200", batch_size=batch_size)
        expected = plan_model("efficientnet_b0", gpu="h200", batch_size=batch_size).totals.floor_us / 1e3
        assert latency(EFFICIENTNET_B0) == pytest.approx(expected, rel=1e-9)
        assert not latency.is_measured
        assert "a lower bound, not measured" in latency.description

    def test_measured_grows_with_the_network(self) -> None:
        latency = MeasuredLatency(rounds=2)
        small, large = latency(TINY), latency(scale(TINY, depth=8, resolution=8))
        assert 0 < small < large < math.inf
        assert latency.is_measured
        assert latency.description.startswith("measured on ")

    def test_what_makes_no_sense_is_refused(self) -> None:
        with pytest.raises(ValueError, match="precision='int8'; allowed: float32"):
            MeasuredLatency(precision="int8")
        with pytest.raises(ValueError, match="batch_size=0"):
            PlannedLatency(batch_size=0)
        with pytest.raises(ValueError, match="gtx"):
            PlannedLatency("gtx")


class TestSearch:
    def test_candidates_are_as_large_as_the_latency_allows(self, tmp_path: Path) -> None:
        counting = ByFlops()
        wanted = {
            "constraint": "latency", "budget_ms": 3 * BASE_MS, "grid": 0.25, "tolerance": 0.15,
            "rounding": DIGITS_ROUNDING, "journal": tmp_path / "journal",
        }  # fmt: skip
        result = search(TINY, evaluations.wide_is_good, latency=counting, **wanted)
        assert len(result.trials) > 3
        for trial in result.trials:
            candidate = trial.candidate
            assert candidate.latency_ms == candidate.cost.multiply_adds / 1e6
            assert 0.5 * wanted["budget_ms"] < candidate.latency_ms <= wanted["budget_ms"]
        assert "ms: one forward, a million multiply-adds in a millisecond." in result.table().notes
        asked = counting.calls
        again = search(TINY, evaluations.wide_is_good, latency=counting, **wanted)
        assert counting.calls == asked
        assert [t.candidate for t in again.trials] == [t.candidate for t in result.trials]
        assert all(trial.is_from_journal for trial in again.trials)

    def test_ways_that_cannot_reach_the_latency_are_left_out(self) -> None:
        class OfPixels(ByFlops):
            def __call__(self, network: Network) -> float:
                return float(network.resolution)

        lines: list[str] = []
        wanted = {"constraint": "latency", "grid": 0.25, "tolerance": 0.15, "rounding": DIGITS_ROUNDING}
        result = search(TINY, None, latency=OfPixels(), budget_ms=20.0, report=lines.append, **wanted)
        assert {trial.candidate.network.resolution for trial in result.trials} == {20}
        assert all(trial.candidate.scaling.gamma > 1 for trial in result.trials)
        assert any("gamma=1 is left out" in line and "stays within" in line for line in lines)

    def test_latency_can_be_asked_for_beside_the_flops(self) -> None:
        wanted = {"grid": 0.25, "tolerance": 0.15, "rounding": DIGITS_ROUNDING, "latency": ByFlops()}
        for trial in search(TINY, None, **wanted).trials:
            assert trial.candidate.latency_ms == trial.candidate.cost.multiply_adds / 1e6

    @pytest.mark.usefixtures("compiled")
    def test_the_command_says_that_a_plan_is_a_bound(self, capsys: pytest.CaptureFixture[str]) -> None:
        status = main(
            ["search", "--constraint", "latency", "--budget-ms", "0.000015", "--device", "h200", "--evaluate", "none",
             "--network", "search_evaluations:TINY", "--grid", "0.5", "--tolerance", "0.3", "--json"]
        )  # fmt: skip
        report = json.loads(capsys.readouterr().out)
        assert status == 0
        assert "planned for NVIDIA H200" in report["latency"]
        assert "not measured" in report["latency"]
        assert all(trial["latency_ms"] <= 0.000015 for trial in report["trials"])

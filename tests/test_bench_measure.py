"""How far a measurement can be believed: spread of rounds, calibration, the state of the machine. No real clock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkernels.bench import machine, measure, timing
from effkernels.bench.calibration import LARGEST_DRIFT, Calibration, calibrate
from effkernels.bench.measure import Measurement, Options

CPU = torch.device("cpu")
STEADY = Calibration(100.0, 10.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Calibrations as a test sets them, and turns that take what the contender returns, in microseconds."""
    found = SimpleNamespace(calibrations=iter(()), turns=0)

    def turns(runs: Mapping[str, Any], *, rounds: int, advance: Any, **options: object) -> dict[str, list[float]]:
        found.turns += 1
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds):
            for name, run in runs.items():
                times[name].append(run(number))
                advance(name)
        return times

    monkeypatch.setattr(measure, "calibrate", lambda device, dtype: next(found.calibrations))
    monkeypatch.setattr(timing, "time_in_turns", turns)
    return found


def scaled(product: float, copy: float = 1.0) -> Calibration:
    return Calibration(product * STEADY.product_gflops, copy * STEADY.copy_gb_s)


class TestSpread:
    def test_of_known_rounds(self) -> None:
        samples = [1.0, 1.0, 9.0, 2.0, 2.0, 0.0, 3.0, 3.0, 3.0]
        assert timing.round_medians(samples, 3) == [1.0, 2.0, 3.0]
        assert timing.spread_of([1.0, 2.0, 3.0]) == pytest.approx((1.2, 2.0, 2.8))

    def test_one_hiccup_does_not_widen_it(self) -> None:
        low, median, high = timing.spread_of([100.0] * 19 + [900.0])
        assert (low, median, high) == (100.0, 100.0, 100.0)

    @given(st.lists(st.floats(1, 1e6), min_size=1, max_size=30))
    def test_order(self, medians: list[float]) -> None:
        low, median, high = timing.spread_of(medians)
        slack = 1e-9 * max(medians)
        assert min(medians) - slack <= low <= median + slack
        assert median <= high + slack <= max(medians) + 2 * slack


class TestCalibration:
    def test_drift_is_that_of_the_rate_that_changed_more(self) -> None:
        assert STEADY.drift(STEADY) == 0
        assert STEADY.drift(scaled(1.02, 0.8)) == pytest.approx(0.2)
        assert STEADY.drift(scaled(1.3, 0.9)) == pytest.approx(0.3)

    def test_measures_this_machine(self) -> None:
        found = calibrate("cpu")
        assert found.product_gflops > 0
        assert found.copy_gb_s > 0

    def test_rates_come_from_the_times(self, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(timing, "time_in_turns", lambda *a, **k: {"product": [1000.0], "copy": [500.0]})
        monkeypatch.setattr("effkernels.environment.last_level_cache_bytes", lambda device: 20 << 20)
        from effkernels.bench import calibration

        calibration._tensors.cache_clear()
        found = calibrate("cpu")
        calibration._tensors.cache_clear()
        assert found.product_gflops == pytest.approx(2 * 768**3 / 1e-3 / 1e9)
        assert found.copy_gb_s == pytest.approx(2 * (40 << 20) / 500e-6 / 1e9)


class TestMeasure:
    runs: Mapping[str, Any] = {"a": lambda number: 10.0 + number, "b": lambda number: 20.0}
    options = Options(warmup=1, rounds=5, memory=False)

    def test_a_steady_machine_is_measured_once(self, clock: SimpleNamespace) -> None:
        clock.calibrations = iter([STEADY, scaled(1 - 0.9 * LARGEST_DRIFT)])
        measured = measure.measure(self.runs, CPU, self.options)
        fields = measured.fields("a")
        assert clock.turns == 1
        assert (fields["steady"], fields["attempts"], fields["rounds"]) == (True, 1, 5)
        assert fields["drift"] == pytest.approx(0.09)
        assert fields["calibration"] == {"product_gflops": [100.0, 91.0], "copy_gb_s": [10.0, 10.0]}
        assert (fields["round_low_us"], fields["round_high_us"]) == pytest.approx((10.4, 13.6))
        assert fields["spread"] == pytest.approx(3.2 / 12, abs=1e-4)
        assert measured.fields("b")["spread"] == 0

    def test_a_drift_is_measured_again_once(self, clock: SimpleNamespace) -> None:
        clock.calibrations = iter([STEADY, scaled(0.5), scaled(0.5), scaled(0.5)])
        lines: list[str] = []
        turns: list[str] = []
        measured = measure.measure(self.runs, CPU, self.options, advance=turns.append, report=lines.append)
        assert clock.turns == 2
        assert measured.fields("a")["steady"] is True
        assert measured.fields("a")["attempts"] == 2
        assert lines == ["the machine's own speed drifted by 50.0%: measured again"]
        assert len(turns) == 10, "the second attempt does not move the progress bar past its end"

    def test_a_drift_that_stays_is_flagged(self, clock: SimpleNamespace) -> None:
        clock.calibrations = iter([STEADY, scaled(1, 2), STEADY, scaled(1, 1.2)])
        fields = measure.measure(self.runs, CPU, self.options).fields("b")
        assert (clock.turns, fields["steady"], fields["attempts"]) == (2, False, 2)
        assert fields["drift"] == pytest.approx(0.2)

    def test_without_calibration_nothing_is_claimed(self, clock: SimpleNamespace) -> None:
        options = Options(warmup=1, rounds=2, calibrate=False)
        fields = measure.measure(self.runs, CPU, options).fields("a")
        assert fields["steady"] is fields["drift"] is fields["calibration"] is None

    def test_fields_are_those_of_a_row(self) -> None:
        fields = Measurement({"a": [1.0, 2.0]}, 2, {"a": 0.5}, (STEADY, STEADY), 1, None).fields("a")
        row = timing.make_row(
            timing.summarise([1.0]), suite="model", case="c", contender="a", device="d", dtype="float32", batch=1,
            date="now",
        )  # fmt: skip
        values = {**json.loads(row.to_json()), **fields, "name": "a"}
        assert json.loads(timing.Row(**values).to_json()) == values
        assert values["host_us"] == 0.5


class TestMachine:
    def test_load_and_clock_of_a_cpu(self, tmp_path: Path) -> None:
        for number, clock in enumerate((2_000_000, 3_000_000)):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/cpufreq"
            folder.mkdir(parents=True)
            (folder / "scaling_cur_freq").write_text(f"{clock}\n")
        found = machine.cpu_state(tmp_path)
        assert found["cpu_mhz"] == 2500
        assert found["load"] >= 0

    def test_clock_from_cpuinfo(self, tmp_path: Path) -> None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 1000.5\nmodel\t: x\ncpu MHz\t\t: 1999.5\n")
        assert machine.cpu_mhz(tmp_path) == 1500.0

    def test_what_is_not_reported_is_absent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_load() -> tuple[float, float, float]:
            raise OSError("no load")

        monkeypatch.setattr("os.getloadavg", no_load)
        assert machine.cpu_state(tmp_path) == {}

    def test_lowest_and_highest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        states: Iterator[dict[str, float]] = iter([{"load": 1.0, "cpu_mhz": 900}, {"load": 0.5}])
        monkeypatch.setattr(machine, "cpu_state", lambda: next(states))
        watch = machine.Watch(CPU)
        watch.sample()
        watch.sample()
        assert watch.summary() == {"load": [0.5, 1.0], "cpu_mhz": [900, 900]}

    def test_clocks_and_throttling_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class NVMLError(Exception):
            pass

        def refused(handle: object) -> int:
            raise NVMLError

        nvml = SimpleNamespace(
            NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
            nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
            nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
            nvmlDeviceGetTemperature=lambda handle, kind: 61,
            nvmlDeviceGetPowerUsage=refused,
            nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1 | 0x4 | 0x40,
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
        monkeypatch.setattr(machine, "load_nvml", lambda: nvml)
        watch = machine.Watch(torch.device("cuda"))
        watch.sample()
        assert watch.summary() == {
            "sm_mhz": [1000, 1000],
            "memory_mhz": [2000, 2000],
            "temperature_c": [61, 61],
            "throttled": ["hardware thermal slowdown", "power cap"],
        }

    def test_without_nvml_the_field_is_empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "load_nvml", lambda: None)
        watch = machine.Watch(torch.device("cuda"))
        watch.sample()
        assert watch.summary() is None

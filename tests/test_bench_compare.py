"""Two files of results: what counts as slower, what is noise, and the exit status."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from effkernels.bench import timing
from effkernels.bench.compare import LEAST_CHANGE, Verdict, compare
from effkernels.bench.timing import Row
from effkernels.cli import main


def row(median_us: float = 100.0, spread: float = 0.02, **changes: Any) -> Row:
    """A row whose rounds spread symmetrically around the median, on a machine that did not drift."""
    made = timing.make_row(
        timing.Statistics(median_us, median_us, median_us, 10), suite="model", case="efficientnet_b0@224",
        contender="engine", device="A CPU, 2 threads", dtype="float32", batch=1, date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    made = dataclasses.replace(
        made, rounds=20, round_low_us=median_us * (1 - spread / 2), round_high_us=median_us * (1 + spread / 2),
        spread=spread, calibration={"product_gflops": [100.0, 100.0], "copy_gb_s": [10.0, 10.0]}, steady=True,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def verdict(before: Row, after: Row, **options: float) -> Verdict:
    (difference,) = compare([before], [after], **options).differences
    return difference.verdict


class TestVerdict:
    @pytest.mark.parametrize(
        ("after_us", "spread", "expected"),
        [
            (100.0, 0.0, Verdict.NOISE),
            (110.0, 0.02, Verdict.SLOWER),
            (90.0, 0.02, Verdict.FASTER),
            (110.0, 0.12, Verdict.NOISE),
            (90.0, 0.12, Verdict.NOISE),
            (100.0 * (1 + 0.9 * LEAST_CHANGE), 0.0, Verdict.NOISE),
            (100.0 * (1 + 1.1 * LEAST_CHANGE), 0.0, Verdict.SLOWER),
        ],
    )
    def test_rounds_decide(self, after_us: float, spread: float, expected: Verdict) -> None:
        assert verdict(row(100.0, spread), row(after_us, spread)) == expected

    def test_exchanged_files_exchange_the_verdict(self) -> None:
        for one, other in ((row(100.0), row(110.0)), (row(100.0), row(101.0)), (row(100.0, 0.3), row(120.0))):
            there, back = verdict(one, other), verdict(other, one)
            assert (there, back) in {(Verdict.SLOWER, Verdict.FASTER), (Verdict.NOISE, Verdict.NOISE)}

    def test_a_slower_machine_is_no_slower_code(self) -> None:
        slow_machine = {"product_gflops": [80.0, 82.0], "copy_gb_s": [10.0, 10.0]}
        assert verdict(row(), row(120.0, calibration=slow_machine)) == Verdict.NOISE
        assert verdict(row(), row(140.0, calibration=slow_machine)) == Verdict.SLOWER

    def test_a_faster_machine_is_no_faster_code(self) -> None:
        fast_machine = {"product_gflops": [130.0, 130.0], "copy_gb_s": [10.0, 10.0]}
        assert verdict(row(), row(80.0, calibration=fast_machine)) == Verdict.NOISE
        assert verdict(row(), row(70.0, calibration=fast_machine)) == Verdict.FASTER

    def test_a_drift_widens_the_noise(self) -> None:
        drifted = {"product_gflops": [100.0, 70.0], "copy_gb_s": [10.0, 10.0]}
        assert verdict(row(), row(130.0, calibration=drifted, steady=False)) == Verdict.NOISE

    def test_rows_without_rounds_are_not_judged(self) -> None:
        assert verdict(row(), row(500.0, round_low_us=None)) == Verdict.UNKNOWN

    def test_least_change(self) -> None:
        assert verdict(row(spread=0.0), row(101.0, 0.0), least_change=0.0) == Verdict.SLOWER


class TestMatching:
    def test_by_case_and_contender(self) -> None:
        before = [row(), row(batch=16), row(contender="eager"), row(suite="latency")]
        after = [row(contender="eager"), row(110.0), row(dtype="bfloat16")]
        found = compare(before, after)
        assert [(one.before.contender, one.after.median_us) for one in found.differences] == [
            ("engine", 110.0), ("eager", 100.0),
        ]  # fmt: skip
        assert [(one.batch, one.suite) for one in found.only_before] == [(16, "model"), (1, "latency")]
        assert [one.dtype for one in found.only_after] == ["bfloat16"]

    def test_the_newest_row_counts(self) -> None:
        later = row(150.0, date="2026-02-01T00:00:00+00:00")
        (difference,) = compare([later, row()], [row(150.0)]).differences
        assert difference.verdict == Verdict.NOISE

    def test_devices(self) -> None:
        other = {"device": "Another CPU", "calibration": {"product_gflops": [10.0, 10.0], "copy_gb_s": [1.0, 1.0]}}
        found = compare([row()], [row(110.0, **other)])
        assert not found.same_device
        assert found.differences[0].verdict == Verdict.SLOWER, "calibrations of two devices are not compared"
        two = compare([row(), row(50.0, device="Another CPU")], [row(50.0, device="Another CPU")])
        assert [one.verdict for one in two.differences] == [Verdict.NOISE]


class TestCommand:
    def files(self, folder: Path, before: list[Row], after: list[Row]) -> list[str]:
        names = [str(folder / name) for name in ("a.jsonl", "b.jsonl")]
        for name, rows in zip(names, (before, after), strict=True):
            timing.append_rows(Path(name), rows)
        return names

    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["compare", *arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    @pytest.mark.parametrize(
        ("after_us", "status", "mark"), [(110.0, 1, "SLOWER"), (90.0, 0, "faster"), (100.5, 0, "")]
    )
    def test_exit_status(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, after_us: float, status: int, mark: str
    ) -> None:
        names = self.files(tmp_path, [row()], [row(after_us)])
        found, out, _ = self.run(capsys, *names)
        assert found == status
        line = next(line for line in out.splitlines() if line.startswith("model efficientnet_b0@224"))
        assert line.endswith(mark or "1.020")

    def test_unmatched_rows_are_named(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        names = self.files(tmp_path, [row(), row(batch=2)], [row(), row(contender="eager")])
        status, _, err = self.run(capsys, *names)
        assert status == 0
        assert err.splitlines() == [
            f"compare: only in {names[0]}: model efficientnet_b0@224, float32, batch 2: engine",
            f"compare: only in {names[1]}: model efficientnet_b0@224, float32, batch 1: eager",
        ]

    def test_json(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        names = self.files(tmp_path, [row()], [row(110.0)])
        status, out, _ = self.run(capsys, *names, "--json")
        (difference,) = json.loads(out)["differences"]
        assert status == 1
        assert (difference["verdict"], difference["change"]) == ("slower", 0.1)

    def test_wrong_arguments(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        names = self.files(tmp_path, [row()], [row(batch=3)])
        (tmp_path / "bad.jsonl").write_text("{}\n")
        (tmp_path / "empty.jsonl").write_text("")
        for arguments, message in (
            (names, "no row of"),
            ((names[0], str(tmp_path / "nowhere.jsonl")), "nowhere.jsonl: No such file"),
            ((names[0], str(tmp_path / "bad.jsonl")), "bad.jsonl:1: not a result row"),
            ((names[0], str(tmp_path / "empty.jsonl")), "empty.jsonl: no rows"),
            ((*names, "--least-change", "-1"), "'-1' is not a percentage of at least 0"),
        ):
            status, out, err = self.run(capsys, *arguments)
            assert (status, out) == (2, "")
            assert message in err

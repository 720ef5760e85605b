"""The fuzzers' own machinery: every part is found, a failure names the seed that repeats it, a lost process is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import inputs


def test_every_part_is_found_and_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.parts()["inputs"] is inputs.run
    asked = []

    def failing(seconds: float, seed: int) -> list[str]:
        asked.append((seconds, seed))
        return ["one: a failure"]

    monkeypatch.setattr(fuzz, "parts", lambda: {"one": failing, "two": lambda seconds, seed: []})
    for arguments, status, count in (([], 1, 1), (["two"], 0, 0), (["one", "two"], 1, 1)):
        monkeypatch.setattr(sys, "argv", ["fuzz", *arguments, "--seconds", "3", "--seed", "7"])
        assert fuzz.main() == status
        assert capsys.readouterr().out.count("one: a failure") == count
    assert asked == [(3.0, 7)] * 2
    monkeypatch.setattr(sys, "argv", ["fuzz", "three"])
    with pytest.raises(SystemExit):
        fuzz.main()
    assert "PART three; allowed: one, two" in capsys.readouterr().err


def test_a_seed_is_one_case(tmp_path: Path) -> None:
    names = [inputs.case(seed, tmp_path)[0] for seed in range(20)]
    assert names == [inputs.case(seed, tmp_path)[0] for seed in range(20)]
    assert len(set(names)) > 10


def test_a_failure_names_the_command_that_repeats_it() -> None:
    tally = inputs.Tally()
    tally.add(3, "image values: pgm", None)
    tally.add(4, "image values: pgm", "is\nwrong")
    assert tally.failures == ["inputs: image values: pgm is wrong; repeat: python -m benchmarks.fuzz.inputs --case 4"]
    assert (tally.attempts["image values"], tally.failed["image values"]) == (2, 1)


def test_a_lost_process_is_a_failure_and_the_next_case_runs() -> None:
    """A case that is no seed ends the worker, as a crash would."""
    found = inputs.tally([1, [], 2])  # type: ignore[list-item]
    assert sum(found.attempts.values()) == 3
    (line,) = found.failures
    assert "ends the process with status 1" in line

"""Finished builds are found again by their sources, tools and options, and never for others (csrc/build_cache.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("EFFKERNELS_BUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    import build_cache

    return build_cache


def built(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "library.so").write_text(text)
    return folder


def test_a_build_comes_back_whole(cache: ModuleType, tmp_path: Path) -> None:
    assert not cache.restore("library", "a", ["library.so"], tmp_path / "out")
    cache.keep("library", "a", ["library.so"], built(tmp_path / "one", "first"))
    assert cache.restore("library", "a", ["library.so"], tmp_path / "out")
    assert (tmp_path / "out" / "library.so").read_text() == "first"
    assert os.listdir(tmp_path / "out") == ["library.so"]
    assert not cache.restore("library", "b", ["library.so"], tmp_path / "out")
    assert not cache.restore("library", "a", ["library.so", "build_info.json"], tmp_path / "out")
    assert not cache.restore("emulator", "a", ["library.so"], tmp_path / "out")


def test_without_the_variable_nothing_is_kept(
    cache: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.keep("library", "a", ["library.so"], built(tmp_path / "one", "first"))
    monkeypatch.delenv("EFFKERNELS_BUILD_CACHE")
    assert not cache.restore("library", "a", ["library.so"], tmp_path / "out")
    cache.keep("library", "b", ["library.so"], built(tmp_path / "one", "first"))
    assert os.listdir(tmp_path / "cache" / "library") == ["a"]


def test_what_was_used_longest_ago_goes_first(cache: ModuleType, tmp_path: Path) -> None:
    folder = built(tmp_path / "one", "first")
    for age, name in enumerate("abcdef"):
        cache.keep("library", name, ["library.so"], folder)
        os.utime(tmp_path / "cache" / "library" / name, (100 + age, 100 + age))
    assert cache.restore("library", "a", ["library.so"], tmp_path / "out")
    cache.keep("library", "g", ["library.so"], folder)
    assert sorted(os.listdir(tmp_path / "cache" / "library")) == [*"acdefg"]


def test_a_cache_that_cannot_be_written_stops_no_build(
    cache: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EFFKERNELS_BUILD_CACHE", str(tmp_path / "file"))
    cache.keep("library", "a", ["library.so"], built(tmp_path / "one", "first"))
    assert f"EFFKERNELS_BUILD_CACHE={tmp_path / 'file'}: this build is not kept" in capsys.readouterr().out


def test_every_source_tool_and_option_is_part_of_the_name(cache: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cache.sources(ROOT / "tests" / "emulation")
    for name in ("csrc/cuda/depthwise.cuh", "csrc/params.h", "CMakeLists.txt", "effkernels/ops/schemas.inc",
                 "tests/emulation/race.cpp"):  # fmt: skip
        assert ROOT / name in files
    names = {cache.key(files, {"torch": "1"}), cache.key(files, {"torch": "2"}), cache.key(files[1:], {"torch": "1"})}
    monkeypatch.setenv("CXXFLAGS", "-O0")
    names.add(cache.key(files, {"torch": "1"}))
    monkeypatch.setenv("CXX", sys.executable)  # prints another version
    names.add(cache.key(files, {"torch": "1"}))
    assert len(names) == 5
    assert cache.key(files, {"torch": "1"}) in names


def test_a_changed_source_is_another_build(cache: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    (tmp_path / "kernel.cu").write_text("one")
    first = cache.key([tmp_path / "kernel.cu"], {})
    assert cache.key([tmp_path / "kernel.cu"], {}) == first
    (tmp_path / "kernel.cu").write_text("two")
    assert cache.key([tmp_path / "kernel.cu"], {}) != first


def test_a_reading_is_kept_by_its_sources_and_facts(cache: ModuleType, tmp_path: Path) -> None:
    from kept_results import kept, python_sources

    source = ROOT / "csrc" / "build_cache.py"
    made: list[str] = []

    def make() -> list[str]:
        made.append("again")
        return [*made]

    assert kept("reading", [source], {"triton": "1"}, make) == ["again"]
    assert kept("reading", [source], {"triton": "1"}, make) == ["again"]
    assert len(made) == 1
    assert kept("reading", [source], {"triton": "2"}, make) == ["again"] * 2
    assert kept("reading", python_sources("csrc/build_cache.py"), {"triton": "1"}, make) == ["again"] * 3

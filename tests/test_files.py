"""Files that users name: what is printed, read, parsed and written of them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from full_disk import small_disk

from effkernels.files import append_text, check_regular, parse_json, printable, printable_lines, read_text, replacing


class TestPrintable:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("photo 1.png", "photo 1.png"),
            ("Zürich 猫.png", "Zürich 猫.png"),
            ("a\x1b[2Jb", r"a\x1b[2Jb"),
            ("a\nERROR: b", r"a\nERROR: b"),
            ("\u202egnp.exe", r"\u202egnp.exe"),
            (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
            ("\ud800", r"\ud800"),
        ],
    )
    def test_escapes_what_a_terminal_could_obey_or_cannot_show(self, text: str, shown: str) -> None:
        assert printable(text) == shown
        assert printable(shown) == shown
        assert shown.encode()

    def test_lines_stay_lines(self) -> None:
        assert printable_lines("one\n  two\r") == "one\n  two\\r"


class TestReading:
    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for read in (check_regular, read_text):
            with pytest.raises(OSError, match=r"pipe is a named pipe; a file is needed"):
                read(tmp_path / "pipe")

    @pytest.mark.parametrize(("name", "message"), [("/dev/zero", "is a device"), ("/", "is a folder")])
    def test_devices_and_folders_are_refused(self, name: str, message: str) -> None:
        with pytest.raises(OSError, match=message):
            read_text(name)

    def test_a_null_character_is_no_file(self) -> None:
        with pytest.raises(FileNotFoundError):
            read_text("a\0b")

    def test_a_link_to_a_file_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        (tmp_path / "link").symlink_to(tmp_path / "file")
        assert read_text(tmp_path / "link") == "text"


class TestJson:
    def test_gives_what_json_gives(self) -> None:
        assert parse_json('{"a": [1, -2.5e3, true, null, "x", 9223372036854775807]}') == {
            "a": [1, -2500.0, True, None, "x", 2**63 - 1]
        }

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[" * 100_000, "nested too deep"),
            ('{"a":' * 100_000, "nested too deep"),
            ("1" * 5000, "of 5000 digits is out of range"),
            ("1" + "0" * 400, "out of range"),
            ("-9223372036854775809", "out of range"),
            ("1e400", "out of range"),
            ("NaN", "NaN is not allowed"),
            ("-Infinity", "Infinity is not allowed"),
            ("{", "Expecting"),
        ],
    )
    def test_refuses_by_one_error(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            parse_json(text)


class TestWriting:
    def test_an_error_leaves_the_old_file_and_nothing_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "file.txt").write_text("old")
        with pytest.raises(OSError, match="File too large"), small_disk(10), replacing(tmp_path / "file.txt") as part:
            part.write_text("half of the new one")
        assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
        assert (tmp_path / "file.txt").read_text() == "old"

    def test_the_new_file_has_the_suffix_meanwhile_and_the_usual_mode(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            with replacing(tmp_path / "new.png") as part:
                assert (part.parent, part.suffix) == (tmp_path, ".png")
                part.write_bytes(b"new")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "new.png").stat().st_mode) == 0o640

    def test_an_old_file_keeps_its_mode_and_a_link_its_target(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        (tmp_path / "file").chmod(0o604)
        (tmp_path / "link").symlink_to("file")
        with replacing(tmp_path / "link") as part:
            part.write_text("new")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_text() == "new"
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o604

    def test_appending_that_fails_leaves_whole_lines(self, tmp_path: Path) -> None:
        append_text(tmp_path / "made" / "rows", "one\n")
        with small_disk(1000), pytest.raises(OSError, match="File too large"):
            append_text(tmp_path / "made" / "rows", "two\n" * 1000)
        append_text(tmp_path / "made" / "rows", "three\n")
        assert (tmp_path / "made" / "rows").read_text() == "one\nthree\n"

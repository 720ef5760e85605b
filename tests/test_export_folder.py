"""The folder that an export works in: what is left of it after an error, an interrupt and `kill -9`."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from effkernels.export.folder import PREFIX, working_folder

PROGRAM = """
import sys, time
from pathlib import Path
from effkernels.export.folder import working_folder
with working_folder(Path(sys.argv[1])) as folder:
    (folder / "half.pt2").write_text("half of it")
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left(error: type[BaseException] | None, tmp_path: Path) -> None:
    def work() -> None:
        with working_folder(tmp_path) as folder:
            assert folder.parent == tmp_path
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (folder / "inside").mkdir()
            (folder / "inside" / "file").write_text("text")
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert list(tmp_path.iterdir()) == []


def test_names_are_new_each_time(tmp_path: Path) -> None:
    with working_folder(tmp_path) as first, working_folder(tmp_path) as second:
        assert first != second
        assert first.is_dir(), "a folder of this very process is no leftover"


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    try:
        with working_folder(tmp_path):
            assert (left / "half.pt2").exists(), "it is at work"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert (left / "half.pt2").exists()
    with working_folder(tmp_path):
        assert not left.exists()


def test_only_folders_of_exports_are_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("text")
    (tmp_path / f"{PREFIX}link").symlink_to(kept)
    (tmp_path / f"{PREFIX}file").write_text("text")
    os.mkfifo(tmp_path / f"{PREFIX}pipe")
    before = sorted(tmp_path.rglob("*"))
    with working_folder(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before

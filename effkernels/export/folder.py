"""The folder that an export works in: beside its target, so that the finished file is moved in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".effkernels-export-"


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """Make a new folder in `parent` that only its owner may read, removed after the block.

    Those that killed exports have left there are removed, too. An export at work holds a lock on its folder, which the
    system takes back when the process ends; where the file system has no such locks nothing is removed.

    Raises:
        OSError: `parent` cannot be written to.
    """
    _remove_leftovers(parent)
    folder, lock = _new(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _new(parent: Path) -> tuple[Path, int]:
    """Return a folder, and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        if not _is_locked_by_other(lock) and os.fstat(lock).st_nlink > 0:
            return folder, lock
        os.close(lock)


def _is_locked_by_other(descriptor: int) -> bool:
    """Try to lock a folder: False if that worked, or if there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove_leftovers(parent: Path) -> None:
    with os.scandir(parent) as entries:
        found = [entry for entry in entries if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False)]
    for entry in found:
        try:
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another user's, or gone meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_uid == os.getuid():
                shutil.rmtree(entry.path, ignore_errors=True)
        except OSError:  # at work, or no locks here
            pass
        finally:
            os.close(descriptor)

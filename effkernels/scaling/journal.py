"""The finished part of a search, as lines of JSON in a file, so that a killed search continues where it stopped.

The first line says which search it is; every further line is one finished piece of work. A line is appended by a single
write and forced to the disk, so that a kill leaves whole lines and at most one torn one at the end, which is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from effkernels.files import parse_json, printable

FORMAT = "effkernels search journal 1"


class JournalError(ValueError):
    """A journal that cannot be used: of another search, in use, or no journal at all."""


class Journal:
    """Finished work by kind and key, in a file that one process holds at a time. Use it as a context manager.

    Args:
        path: of the file; it is made if it is not there, its folder too. None: nothing is kept.
        settings: what decides the results, in plain JSON values. A file that was begun with others is refused.

    Raises:
        JournalError: the file belongs to another search (the message lists the differences), another process is
            writing to it, or it is something else.
        OSError: it cannot be opened or written to.
    """

    def __init__(self, path: str | Path | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._file = -1
        if self.path is None:
            return
        self._file = _hold(self.path)
        try:
            self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def _read(self, settings: dict[str, Any]) -> None:
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            content = file.read()
        whole = content.rfind(b"\n") + 1  # a last line that a kill or a full disk cut off is dropped
        lines = content[:whole].decode(errors="replace").splitlines()
        if not lines:
            if content and not b'{"journal"'.startswith(content[:10]):
                raise JournalError(f"journal {printable(self.path)}: not a journal of a search")
            os.ftruncate(self._file, 0)
            self._append({"journal": FORMAT, **settings})
            return
        parsed = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        header = parsed[0]
        if header.pop("journal", None) != FORMAT:
            raise JournalError(
                f"journal {printable(self.path)}: not a journal of a search; allowed: {FORMAT!r} in its first line"
            )
        if header != settings:
            raise JournalError(
                f"journal {printable(self.path)} belongs to another search: {_differences(header, settings)}; give "
                "another file, or the search that it belongs to"
            )
        os.ftruncate(self._file, whole)
        for record in parsed[1:]:
            self._records[record.pop("kind"), record.pop("key")] = record

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = parse_json(line)
            complete = isinstance(record, dict) and (number == 1 or {"kind", "key"} <= record.keys())
        except ValueError:
            complete = False
        if not complete:
            raise JournalError(
                f"journal {printable(self.path)}:{number}: not a record of a search: {printable(line[:80])}"
            )
        return record  # type: ignore[no-any-return]

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return what was recorded last under a kind and a key; None if nothing was."""
        return self._records.get((kind, key))

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return what was recorded under a kind, in the order in which its keys came."""
        return [record for (of, _), record in self._records.items() if of == kind]

    def add(self, kind: str, key: str, values: Mapping[str, Any]) -> None:
        """Record finished work; on the disk when this returns."""
        self._records[kind, key] = dict(values)
        if self.path is not None:
            self._append({"kind": kind, "key": key, **values})

    def _append(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        size = os.fstat(self._file).st_size
        try:
            rest = memoryview(line)
            while rest:  # a full disk takes a part first, and says why with the next
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)  # or the next line would begin in the middle of this one
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Let the file go."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hold(path: Path) -> int:
    """Open a file to append to, made if need be as its folder is, for one process at a time until it is closed.

    Raises:
        JournalError: another process holds it, or it is a pipe or a device.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not blocking: a named pipe that nobody reads would be waited for.
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise JournalError(f"journal {printable(path)} is a pipe or a device; a file is needed")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"journal {printable(path)}: another search is writing to it") from error
    except BaseException:
        os.close(file)
        raise
    return file


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return ", ".join(f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here" for name in names)

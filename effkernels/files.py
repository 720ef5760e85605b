"""Files that users name: reading that cannot hang, JSON of sane numbers, outputs replaced whole, names to print."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_LARGEST_INTEGER = 2**63


def printable(text: object) -> str:
    r"""Return a text on one line with everything escaped that a terminal could obey or cannot show.

    Control characters (a name may hold "\x1b[2J" or a line break), marks that change the direction of the text, and
    bytes of a file name that are not UTF-8 become "\x1b", "\n", "\u202e", "\xff".
    """
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def printable_lines(text: object) -> str:
    """Return `printable` line by line, for a message of several lines."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def check_regular(path: str | Path) -> os.stat_result:
    """Refuse what is no file before it is opened: a named pipe would be waited for without end.

    Raises:
        OSError: no such file, or a folder, named pipe, device or socket.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # a null character in the name
        raise FileNotFoundError(f"no such file: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(f"{printable(path)} is {kind}; a file is needed")
    return found


def read_text(path: str | Path) -> str:
    """Return the UTF-8 text of a file.

    Raises:
        OSError: as of `check_regular`.
        ValueError: the file is not UTF-8.
    """
    check_regular(path)
    return Path(path).read_text(encoding="utf-8")


def parse_json(text: str) -> Any:
    """Parse JSON whose numbers are finite and fit 64 bits.

    Raises:
        ValueError: no JSON, nested too deep, or a number out of range.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is not allowed; needed: finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -_LARGEST_INTEGER <= (value := int(text)) < _LARGEST_INTEGER:
        raise ValueError(f"a whole number of {len(text.removeprefix('-'))} digits is out of range")
    return value


@contextmanager
def replacing(path: str | Path, *, follow_links: bool = True) -> Iterator[Path]:
    """Write a file so that there is the old one or the whole new one, and never half of one.

    The block gets a path beside the target, of the same suffix and of a name that nobody can know before, and fills
    it; the file then takes the target's place. After an error it is removed, and the target is as it was.

    Args:
        follow_links: where the target is a link, replace what it leads to; else the link.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    target = path.resolve() if follow_links and path.is_symlink() else path
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {printable(target.parent)}", str(path))
    handle, name = tempfile.mkstemp(prefix=f".{target.stem[:40]}-", suffix=f".part{target.suffix}", dir=target.parent)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a disk may say that it is full as late as here
        os.chmod(part, _mode(target))
        os.replace(part, target)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno is not None:  # of the name that the user gave
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _mode(target: Path) -> int:
    """Return the permissions of a file that is written anew: those that it has, or what the process gives new files."""
    with suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0o077)
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: str | Path, text: str, *, follow_links: bool = True) -> None:
    """Write a text file as `replacing` does."""
    with replacing(path, follow_links=follow_links) as part:
        part.write_text(text, encoding="utf-8")


def append_text(path: str | Path, text: str) -> None:
    """Append to a text file, in a folder that is made if need be; after an error the file is as it was.

    Raises:
        OSError: the file cannot be written to, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        content = memoryview(text.encode())
        try:
            while content:
                content = content[file.write(content) :]
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(file.fileno(), size)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise

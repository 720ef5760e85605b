"""Optuna's study in a file, kept for one search alone and free of what a kill left in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effkernels.files import parse_json, printable
from effkernels.scaling.journal import hold, whole_lines

SETTINGS = "settings"  # an attribute of the study: what decides its results
_NAME = "effkernels baseline"
_BEGIN = b'{"op_code"'  # of every line that Optuna's journal has


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a study for this search alone, of whole lines that Optuna wrote.

    Optuna appends to the file: the line after a torn one would be lost with it, and every later one too.

    Raises:
        ValueError: another search is writing to it, or it is no study.
    """
    file = hold(path, "study")
    try:
        with open(file, "rb", closefd=False) as reader:
            content = reader.read()
        whole = whole_lines(content)
        if content and not whole and not content.startswith(_BEGIN[: len(content)]):
            raise ValueError(f"study {printable(path)}: not a study of a search for a baseline")
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                is_record = "op_code" in parse_json(line.decode())
            except (ValueError, TypeError):
                is_record = False
            if not is_record:
                where = "" if number == 1 else f":{number}"
                raise ValueError(f"study {printable(path)}{where}: not a study of a search for a baseline")
        os.ftruncate(file, whole)
        # Nobody else writes now: a lock of Optuna's own is of a search that was killed.
        lock = path.with_name(path.name + ".lock")
        if lock.is_symlink():
            lock.unlink()
        yield
    finally:
        os.close(file)


def open_study(optuna: Any, path: str | Path | None, settings: dict[str, Any]) -> Any:
    """Return a new study, or one to continue; ValueError if it belongs to another search."""
    storage = None
    if path is not None:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    try:
        study = optuna.create_study(study_name=_NAME, storage=storage, direction="maximize", load_if_exists=True)
    except (ValueError, KeyError) as error:  # what Optuna's journal raises about a file that it did not write
        raise ValueError(f"study {printable(path)}: not a study of a search for a baseline: {error}") from error
    found = study.user_attrs.get(SETTINGS)
    if found is None:
        study.set_user_attr(SETTINGS, settings)
    elif found != settings:
        names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
        differences = [f"{name} is {found.get(name)!r} there and {settings.get(name)!r} here" for name in names]
        raise ValueError(f"study {printable(path)} belongs to another search: {', '.join(differences)}")
    return study

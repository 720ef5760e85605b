"""Accuracies of a user's own training runs, read from a file to be laid over the counted FLOPs of figures 3 and 8."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effkernels.files import parse_json, printable, read_text
from effkernels.scaling.table import Table


@dataclass(frozen=True)
class Run:
    """One trained network.

    Attributes:
        name: of the run; that of a line of the growth table gives it the line's FLOPs.
        accuracy: as the user measured it, in any unit.
        gflops: billions of multiply-adds of one image.
        way: "depth", "width", "resolution", "compound" or what else joins runs to a line.
    """

    name: str
    accuracy: float
    gflops: float
    way: str


def read_accuracies(path: str | Path, growth: Table) -> list[Run]:
    """Read runs from CSV with a header, or from JSON lines.

    Args:
        path: FILE.csv, or FILE.jsonl with one object a line; fields `name` and `accuracy`, for a run that the table
            does not have also `gflops`, and `way` if it is to be joined with others.
        growth: the table of `effkernels.scaling.tables.growth`.

    Raises:
        ValueError: the file cannot be read, or a line lacks something; the message names the line.
    """
    known = {str(row["name"]): row for row in growth.rows}
    runs = []
    for number, record in enumerate(_records(Path(path)), 1):
        where = f"{path}, run {number}"
        name = str(record.get("name") or "")
        row: Mapping[str, Any] = known.get(name, {})
        gflops = record.get("gflops") or row.get("gflops")
        if not name:
            raise ValueError(f"{where}: no name")
        if gflops is None:
            raise ValueError(f"{where}: {name!r} is no line of the growth table, so it needs gflops; the table's lines "
                             f"are {', '.join(known)}")  # fmt: skip
        try:
            accuracy, billions = float(record["accuracy"]), float(gflops)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: accuracy={record.get('accuracy')!r}, gflops={gflops!r}; needed: numbers"
            ) from error
        runs.append(Run(name, accuracy, billions, str(record.get("way") or row.get("way") or name)))
    if not runs:
        raise ValueError(f"{path}: no runs")
    return runs


def _records(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        text = read_text(path)
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        records = [parse_json(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{printable(path)}: {error}; needed: a .csv with a header, or one JSON object a line"
        ) from error
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: a line is not a JSON object")
    return records

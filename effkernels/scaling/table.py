"""A table of numbers that prints itself as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from effkernels import console

Value = str | int | float | None
FORMATS: tuple[str, ...] = ("text", "markdown", "csv", "json")


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: its name in CSV and JSON, where values are unrounded.
        title: its name in printed tables.
        spec: how a number is shown there, as for `format`.
    """

    key: str
    title: str
    spec: str = ""

    def show(self, value: Value) -> str:
        """Return a value as people read it; nothing for None."""
        if value is None:
            return ""
        return value if isinstance(value, str) else format(value, self.spec)


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("%") or "0")
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        name: of files that hold it.
        title: one line above it.
        columns: in order.
        rows: values by column key.
        notes: sentences below it.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Value], ...]
    notes: tuple[str, ...] = ()

    def shown(self) -> list[list[str]]:
        """Return the rows as people read them."""
        return [[column.show(row.get(column.key)) for column in self.columns] for row in self.rows]

    def markdown(self) -> str:
        """Return a GitHub table under its title, notes below."""
        cells = self.shown()
        rules = ["--:" if all(_is_number(line[i]) for line in cells) else "---" for i in range(len(self.columns))]
        lines = [[column.title for column in self.columns], rules, *cells]
        body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *body, *(f"\n{note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        """Comma-separated values under the columns' keys, numbers unrounded, no notes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column.key for column in self.columns])
        writer.writerows([[row.get(column.key) for column in self.columns] for row in self.rows])
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """Title, rows by key and notes, for JSON."""
        rows = [{column.key: row.get(column.key) for column in self.columns} for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "notes": list(self.notes)}

    def json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def show(self, form: str) -> None:
        """Print it on standard output.

        Raises:
            ValueError: an unknown format.
        """
        if form not in FORMATS:
            raise ValueError(f"format={form!r}; allowed: {', '.join(FORMATS)}")
        if form == "text":
            console.table(self.title, [column.title for column in self.columns], self.shown())
            for note in self.notes:
                print(note)
        else:
            print({"markdown": self.markdown, "csv": self.csv, "json": self.json}[form](), end="")

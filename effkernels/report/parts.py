"""What a page is made of: tables and pictures, each of which says whether it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape


class Origin(Enum):
    """Where figures come from."""

    MEASURED = "measured"
    ESTIMATED = "estimated"


@dataclass(frozen=True)
class Table:
    """Cells as text, below the names of the columns.

    Attributes:
        title: what is above it.
        note: a line below it; "" for none.
        numeric: whether the columns after the first one are numbers, which are set to the right.
    """

    title: str
    columns: Sequence[str]
    cells: Sequence[Sequence[str]]
    origin: Origin
    note: str = ""
    numeric: bool = True

    def markdown(self) -> list[str]:
        """Return the lines of a Markdown table, without the title."""
        align = "--:|" if self.numeric else "---|"
        lines = ["| " + " | ".join(self.columns) + " |", "|---|" + align * (len(self.columns) - 1)]
        return lines + ["| " + " | ".join(line) + " |" for line in self.cells]

    def html(self) -> str:
        """Return the table for a page."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.columns)
        body = "".join(
            f'<tr><th scope="row">{escape(line[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
            + "</tr>"
            for line in self.cells
        )  # fmt: skip
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        kind = ' class="text"' if not self.numeric else ""
        table = f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<h3>{escape(self.title)}</h3><div class="wide">{table}</div>{note}'


@dataclass(frozen=True)
class Picture:
    """A chart.

    Attributes:
        name: the stem of its file.
        title: what it shows.
        svg: of `effkernels.report.svg.Drawing.svg`.
    """

    name: str
    title: str
    svg: str
    origin: Origin

    def html(self) -> str:
        """Return the picture for a page."""
        return f"<figure>{self.svg}</figure>"

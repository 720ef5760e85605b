"""One self-contained page of HTML: tables and pictures of one origin, without scripts, light or dark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

from effkernels.report.parts import Origin, Picture, Table
from effkernels.report.svg import FONT, style

_STYLE = (
    f"body{{margin:0 auto;max-width:60rem;padding:1rem 1.25rem 4rem;background:var(--page);color:var(--ink);"
    f"font:16px/1.5 {FONT}}}"
    "h1{font-size:1.7rem;margin:.6em 0 .2em}"
    "h2{font-size:1.3rem;margin:2.2em 0 .4em;border-bottom:1px solid var(--grid)}"
    "h3{font-size:1rem;margin:1.6em 0 .4em}p{margin:.4em 0}.note,nav{color:var(--muted);font-size:.9rem}"
    "nav a{margin-right:1.2em}a{color:var(--s0)}figure{margin:1.4rem 0}.wide{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}"
    "th,td{padding:.25rem .7rem;border-bottom:1px solid var(--grid);text-align:right;white-space:nowrap;"
    "font-weight:400}th:first-child{text-align:left;padding-left:0}thead th{font-weight:600;color:var(--muted)}"
    "table.text td,table.text th{text-align:left}"
    ".origin{display:inline-block;padding:.1rem .6rem;border-radius:1rem;background:var(--t4);font-size:.875rem}"
)


class Page:
    """A page that grows section by section.

    Attributes:
        origin: of everything on it: a reader must not take an estimate for a measurement because both are in sight.
    """

    def __init__(self, title: str, origin: Origin, lead: Iterable[str]) -> None:
        self.title = title
        self.origin = origin
        self._lead = list(lead)
        self._sections: list[tuple[str, str]] = []

    def add(self, heading: str, parts: Iterable[Table | Picture], text: Iterable[str] = ()) -> None:
        """Add a section.

        Args:
            text: paragraphs before the parts.

        Raises:
            ValueError: a part is not of the page's origin.
        """
        html = [f"<p>{escape(paragraph)}</p>" for paragraph in text]
        for part in parts:
            if part.origin != self.origin:
                raise ValueError(
                    f"{part.title!r} is {part.origin.value}, and the page is of what was {self.origin.value}: "
                    "estimates and measurements have pages of their own"
                )
            html.append(part.html())
        self._sections.append((heading, "".join(html)))

    def html(self) -> str:
        """Return the whole page."""
        body = [f"<h1>{escape(self.title)}</h1>", f'<p><span class="origin">{self.origin.value}</span></p>']
        body += [f"<p>{escape(paragraph)}</p>" for paragraph in self._lead]
        names = {heading: re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") for heading, _ in self._sections}
        links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for heading, name in names.items())
        body.append(f"<nav>{links}</nav>")
        body += [f'<h2 id="{names[heading]}">{escape(heading)}</h2>{html}' for heading, html in self._sections]
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{escape(self.title)}</title><style>{style(':root')}{_STYLE}</style></head>"
            f"<body>{''.join(body)}</body></html>\n"
        )

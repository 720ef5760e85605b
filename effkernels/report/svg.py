"""A small drawing in SVG: shapes and texts by classes, whose colours follow the reader's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

# Colours of the contenders and shapes beside them, so that a reader who sees no colours can tell them apart.
_SERIES_LIGHT = (
    "#0969da", "#0a7d6c", "#8250df", "#6e7781", "#bc4c00", "#cf222e", "#7d6600", "#bf3989", "#116329", "#1b7c83",
    "#9a6700", "#57606a",
)  # fmt: skip
_SERIES_DARK = (
    "#58a6ff", "#3fd0b4", "#bc8cff", "#9ea7b3", "#f0883e", "#ff7b72", "#d4b106", "#f778ba", "#56d364", "#39c5cf",
    "#e3b341", "#c9d1d9",
)  # fmt: skip
# Backgrounds of text: tints that dark letters can be read on, and in the dark scheme shades for light ones.
_TINTS_LIGHT = (
    "#b6d6ff", "#ffd8b5", "#b5e8c9", "#e2c9ff", "#ffe7a0", "#ffc9d2", "#bfeaf0", "#dfe3e8", "#d8ecb0", "#f3d0ee",
)  # fmt: skip
_TINTS_DARK = (
    "#1f4b80", "#7a4a1d", "#1c5f3f", "#54307f", "#6b5610", "#7a2b3a", "#17535c", "#4a525c", "#43601a", "#6b2f63",
)  # fmt: skip
SERIES, TINTS = len(_SERIES_LIGHT), len(_TINTS_LIGHT)
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "plus")

FONT = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif"


def _scheme(ink: str, muted: str, grid: str, page: str, series: Sequence[str], tints: Sequence[str]) -> str:
    values = {"ink": ink, "muted": muted, "grid": grid, "page": page}
    values |= {f"s{number}": colour for number, colour in enumerate(series)}
    values |= {f"t{number}": colour for number, colour in enumerate(tints)}
    return ";".join(f"--{name}:{colour}" for name, colour in values.items())


LIGHT = _scheme("#1f2328", "#59636e", "#d1d9e0", "#ffffff", _SERIES_LIGHT, _TINTS_LIGHT)
DARK = _scheme("#e6edf3", "#9198a1", "#3d444d", "#0d1117", _SERIES_DARK, _TINTS_DARK)


def style(selector: str) -> str:
    """Return the style sheet of charts; the colours are set on what a selector names, and reach what is in it."""
    rules = [
        f"{selector}{{{LIGHT}}}",
        f"@media (prefers-color-scheme:dark){{{selector}{{{DARK}}}}}",
        f".chart text{{font-family:{FONT};font-size:12px;fill:var(--ink)}}",
        ".chart .title{font-size:14px;font-weight:600}",
        ".chart .muted{fill:var(--muted)}",
        ".chart .small{font-size:11px}",
        ".chart .halo{paint-order:stroke;stroke:var(--page);stroke-width:4px;stroke-linejoin:round}",
        ".chart .page{fill:var(--page)}",
        ".chart .grid{stroke:var(--grid);stroke-width:1;fill:none}",
        ".chart .axis{stroke:var(--muted);stroke-width:1;fill:none}",
        ".chart .roof{stroke:var(--ink);stroke-width:2;fill:none}",
        ".chart .edge{stroke:var(--page);stroke-width:1}",
        ".chart .line{fill:none;stroke-width:2}",
        ".chart .leader{stroke-width:1;opacity:.6}",
    ]
    rules += [f".chart .s{n}{{fill:var(--s{n});stroke:var(--s{n})}}" for n in range(SERIES)]
    rules += [f".chart .t{n}{{fill:var(--t{n})}}" for n in range(TINTS)]
    rules += [f".chart text.s{n}{{stroke:none}}.chart .line.s{n}{{fill:none}}" for n in range(SERIES)]
    return "".join(rules)


_NARROW, _WIDE = set("ijlt.,:;|!'()[] fI"), set("mwMW@%")


def text_width(text: str, size: float = 12.0) -> float:
    """Return about how wide a text is in pixels, on the wide side: fonts differ."""
    units = sum(0.36 if letter in _NARROW else 0.92 if letter in _WIDE else 0.61 for letter in text)
    return units * size


class Drawing:
    """An SVG image that grows by its methods. x and y are in pixels from the top left corner."""

    def __init__(self, width: float, title: str) -> None:
        self.width = width
        self.title = title
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, *, kind: str = "", anchor: str = "start") -> None:
        """Write a text whose base line is at y; ``anchor`` is start, middle or end."""
        classes = f' class="{kind}"' if kind else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{classes}>{escape(text, quote=False)}</text>'
        )

    def rect(self, x: float, y: float, width: float, height: float, kind: str, tip: str = "") -> None:
        """Fill a rectangle; the tip appears where the mouse rests on it."""
        shape = f'x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect {shape} class="{kind}">{_tip(tip)}</rect>')

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" class="{kind}"/>')

    def marker(self, x: float, y: float, marker: str, kind: str, tip: str = "", size: float = 4.5) -> None:
        """Draw one of `MARKERS`."""
        shapes: dict[str, list[tuple[float, float]]] = {
            "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
            "triangle": [(0, -1.25), (1.15, 0.9), (-1.15, 0.9)],
            "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
            "cross": _star(math.pi / 4),
            "plus": _star(0.0),
        }
        if marker == "circle":
            self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" class="{kind} edge">{_tip(tip)}</circle>')
            return
        corners = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in shapes[marker])
        self._parts.append(f'<polygon points="{corners}" class="{kind} edge">{_tip(tip)}</polygon>')

    def svg(self, height: float) -> str:
        """Return the image for a page that has the `style`; it fills the width that it is given, up to its own."""
        box = f'viewBox="0 0 {self.width:.0f} {height:.0f}"'
        name = escape(self.title)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {box} width="{self.width:.0f}" '
            f'height="{height:.0f}" style="max-width:100%;height:auto" role="img" aria-label="{name}">'
            f"{''.join(self._parts)}</svg>"
        )


def _tip(text: str) -> str:
    return f"<title>{escape(text, quote=False)}</title>" if text else ""


def _star(turn: float) -> list[tuple[float, float]]:
    """Return the corners of a cross of four thick arms."""
    found = []
    for arm in range(4):
        angle = turn + arm * math.pi / 2
        for along, side in ((0.4, -0.4), (1.3, -0.4), (1.3, 0.4)):
            x, y = math.cos(angle), math.sin(angle)
            found.append((along * x - side * y, along * y + side * x))
    return found


def standalone(svg: str) -> str:
    """Return an image of `Drawing.svg` as a file of its own, with its style sheet and the page's colour below it."""
    head, _, body = svg.partition(">")
    return f'{head}><style>{style(".chart")}</style><rect width="100%" height="100%" class="page"/>{body}\n'


def linear_ticks(top: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers from 0 to at least ``top``, which is positive."""
    step = 10 ** math.floor(math.log10(top / count))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if top / (step * factor) <= count)
    return [number * step for number in range(math.ceil(top / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two positive ones: powers of ten, and 2 and 5 times them if there are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def number(value: float) -> str:
    """Return a number in three digits or so: 0.123, 4.57, 81.2, 1,234."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def tick_text(value: float) -> str:
    """Return the text of a tick: no digits more than it has."""
    return f"{value:,.6f}".rstrip("0").rstrip(".")

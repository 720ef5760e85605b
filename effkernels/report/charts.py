"""The kinds of charts: lines over a batch size, bars, stacked bars, and a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effkernels.report.svg import (
    MARKERS,
    SERIES,
    TINTS,
    Drawing,
    linear_ticks,
    log_ticks,
    number,
    text_width,
    tick_text,
)

WIDTH = 760
_RIGHT = 16
# Each contender has one colour in all charts; the others get those that are left.
_KNOWN = (
    "effkernels", "optimized", "engine", "eager", "eager-channels-last", "compile", "timm", "torchvision",
    "onnxruntime", "openvino",
)  # fmt: skip


def colours(names: Sequence[str]) -> dict[str, int]:
    """Return the number of the colour of each contender, by the first word of its name or label."""
    found: dict[str, int] = {}
    for name in names:
        word = name.split(" ")[0].rstrip(",")
        word = "effkernels" if word.startswith("effkernels-") and not word.endswith("-graph") else word
        if word in _KNOWN and _KNOWN.index(word) not in found.values():
            found[name] = _KNOWN.index(word)
    free = [index for index in range(SERIES) if index not in found.values()]
    if found:
        free = free[::-1]  # a colour that belongs to nobody comes first
    for index, name in enumerate(name for name in names if name not in found):
        found[name] = free[index % len(free)]
    return found


def _begin(title: str, subtitle: str) -> tuple[Drawing, float]:
    """Return a drawing with its title, and y of the first line below it."""
    drawing, y = Drawing(WIDTH, title), 40.0
    drawing.text(12, 22, title, kind="title")
    for line in _wrapped(subtitle, WIDTH - 24):
        drawing.text(12, y, line, kind="muted")
        y += 16
    return drawing, y + 6


def _wrapped(text: str, wide: float) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer) > wide:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _legend(drawing: Drawing, y: float, entries: Sequence[tuple[str, str, str]], left: float = 12) -> float:
    """Draw (name, marker, class) in rows; returns y below them."""
    x = left
    for name, marker, kind in entries:
        wide = 16 + text_width(name) + 18
        if x + wide > WIDTH - _RIGHT and x > left:
            x, y = left, y + 18
        drawing.marker(x + 6, y - 4, marker, kind)
        drawing.text(x + 16, y, name)
        x += wide
    return y + 14


def _spread_out(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return places near the given ones, in their order, that are a distance apart and between two bounds."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [0.0] * len(places)
    previous = low - distance
    for index in order:
        moved[index] = previous = max(places[index], previous + distance)
    following = high + distance
    for index in reversed(order):
        moved[index] = following = min(moved[index], following - distance)
    return moved


def lines(
    title: str, subtitle: str, x_label: str, y_label: str, series: Mapping[str, Sequence[tuple[float, float]]],
    *, log: bool = False,
) -> str:  # fmt: skip
    """Draw a line for each name through (x, y), x in steps of a factor; the names are at the ends of the lines.

    Args:
        log: y in steps of a factor, too, so that a ratio is a distance; else y begins at 0.
    """
    (drawing, begin), names = _begin(title, subtitle), list(series)
    top, bottom, height = begin + 12, begin + 328, begin + 376
    numbers = colours(names)
    left, right = 66.0, WIDTH - 28 - max(text_width(name) for name in names)
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    first, last = math.log2(xs[0]), math.log2(xs[-1])
    if log:
        low, high = min(ys) / 1.15, max(ys) * 1.15
        ticks = log_ticks(low, high)
    else:
        ticks = linear_ticks(max(ys))
        low, high = 0.0, ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        along = (math.log2(x) - first) / (last - first) if last > first else 0.5
        up = math.log(y / low) / math.log(high / low) if log else y / high
        return left + 14 + along * (right - left - 28), bottom - up * (bottom - top)

    for tick in ticks:
        y = place(xs[0], tick)[1]
        drawing.line([(left, y), (right, y)], "grid")
        drawing.text(left - 8, y + 4, tick_text(tick), kind="muted small", anchor="end")
    for x in xs:
        drawing.text(place(x, ticks[-1])[0], bottom + 18, tick_text(x), kind="muted small", anchor="middle")
    drawing.line([(left, bottom), (right, bottom)], "axis")
    drawing.text((left + right) / 2, bottom + 38, x_label, kind="muted", anchor="middle")
    drawing.text(12, begin - 2, y_label, kind="muted small")
    ends = [place(*max(points)) for points in series.values()]
    labels = _spread_out([y for _, y in ends], 15, top, bottom)
    for name, points, (end_x, end_y), label_y in zip(names, series.values(), ends, labels, strict=True):
        kind, marker = f"s{numbers[name]}", MARKERS[names.index(name) % len(MARKERS)]
        drawing.line([place(*point) for point in sorted(points)], f"line {kind}")
        for x, y in points:
            drawing.marker(*place(x, y), marker, kind, f"{name}, {x_label} {tick_text(x)}: {number(y)} {y_label}")
        drawing.line([(end_x + 6, end_y), (right + 2, label_y)], f"line leader {kind}")
        drawing.text(right + 6, label_y + 4, name, kind=kind)
    return drawing.svg(height)


def bars(
    title: str, subtitle: str, groups: Sequence[tuple[str, Mapping[str, float]]], unit: str, *, top: float | None = None
) -> str:
    """Draw groups of bars, from 0: a bar for each name of a group, its value at its end.

    Args:
        groups: a label and values by name.
        unit: after each value.
        top: the end of the axis; default: the largest value.
    """
    drawing, y = _begin(title, subtitle)
    names = list(dict.fromkeys(name for _, values in groups for name in values))
    numbers = colours(names)
    y = _legend(drawing, y, [(name, "square", f"s{numbers[name]}") for name in names]) if len(names) > 1 else y
    begin = y
    left = 24 + max(text_width(label) for label, _ in groups)
    largest = max(value for _, values in groups for value in values.values())
    values_end = max(text_width(f"{number(v)} {unit}", 11) for _, values in groups for v in values.values())
    right = WIDTH - _RIGHT - values_end - 8
    ticks = linear_ticks(max(top or 0.0, largest))
    scale = (right - left) / ticks[-1]
    heights = [13 * len(values) + 9 for _, values in groups]
    end = begin + sum(heights) + 4
    for tick in ticks:
        drawing.line([(left + tick * scale, begin - 2), (left + tick * scale, end)], "grid")
        drawing.text(left + tick * scale, end + 16, tick_text(tick), kind="muted small", anchor="middle")
    for (label, values), high in zip(groups, heights, strict=True):
        drawing.text(left - 8, y + high / 2 + 2, label, anchor="end")
        bar_y = y + 4
        for name, value in values.items():
            said = f"{number(value)} {unit}"
            drawing.rect(left, bar_y, value * scale, 11, f"s{numbers[name]}", f"{label}: {name}: {said}")
            drawing.text(left + value * scale + 5, bar_y + 9.5, said, kind="small halo")
            bar_y += 13
        y += high
    drawing.line([(left, begin - 2), (left, end)], "axis")
    drawing.text((left + right) / 2, end + 34, unit, kind="muted", anchor="middle")
    return drawing.svg(end + 44)


def stacked(title: str, subtitle: str, stacks: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Draw a bar for each name, whose parts follow each other; parts of one name have one colour.

    Args:
        stacks: values of parts by the name of a bar.
        unit: of the values.
    """
    drawing, y = _begin(title, subtitle)
    parts = list(dict.fromkeys(part for values in stacks.values() for part in values))
    tints = {part: f"t{index % TINTS}" for index, part in enumerate(parts)}
    y = _legend(drawing, y, [(part, "square", tints[part]) for part in parts])
    begin, high = y, 46
    left = 24 + max(text_width(name) for name in stacks)
    sums = {name: sum(values.values()) for name, values in stacks.items()}
    right = WIDTH - _RIGHT - max(text_width(f"{number(value)} {unit}") for value in sums.values()) - 8
    ticks = linear_ticks(max(sums.values()))
    scale = (right - left) / ticks[-1]
    end = begin + high * len(stacks) + 2
    for tick in ticks:
        drawing.line([(left + tick * scale, begin), (left + tick * scale, end)], "grid")
        drawing.text(left + tick * scale, end + 16, tick_text(tick), kind="muted small", anchor="middle")
    for name, values in stacks.items():
        drawing.text(left - 8, y + high / 2 + 4, name, anchor="end")
        x = left
        for part, value in values.items():
            wide, said = value * scale, number(value)
            share = f"{value / sums[name]:.0%}"
            drawing.rect(x, y + 6, wide, high - 12, f"{tints[part]} edge", f"{name}: {part}: {said} {unit}, {share}")
            if text_width(said, 11) + 6 < wide:
                drawing.text(x + wide / 2, y + high / 2 + 4, said, kind="small", anchor="middle")
            x += wide
        drawing.text(x + 6, y + high / 2 + 4, f"{number(sums[name])} {unit}")
        y += high
    drawing.line([(left, begin), (left, end)], "axis")
    drawing.text((left + right) / 2, end + 34, unit, kind="muted", anchor="middle")
    return drawing.svg(end + 44)


@dataclass(frozen=True)
class Point:
    """A kernel in a roofline.

    Attributes:
        series: by which it is coloured.
        kind: by which it is shaped.
        intensity: FLOPs for each byte.
        gflops: FLOPs a second, in 1e9.
        name: of the kernel, for the tip.
    """

    series: str
    kind: str
    intensity: float
    gflops: float
    name: str


@dataclass(frozen=True)
class Ceiling:
    """The rates that no kernel passes.

    Attributes:
        gflops: FLOPs a second, in 1e9.
        gb_s: bytes a second, in 1e9.
        compute, memory: where the rates come from, such as "matrix product".
    """

    gflops: float
    gb_s: float
    compute: str
    memory: str


def roofline(title: str, subtitle: str, points: Sequence[Point], ceiling: Ceiling) -> str:
    """Draw kernels below the roof that compute and memory make, both axes in steps of a factor."""
    drawing, y = _begin(title, subtitle)
    series, kinds = (list(dict.fromkeys(getattr(point, of) for point in points)) for of in ("series", "kind"))
    numbers = colours(series)
    shapes = {kind: MARKERS[index % len(MARKERS)] for index, kind in enumerate(kinds)}
    y = _legend(drawing, y, [(name, "square", f"s{numbers[name]}") for name in series])
    y = _legend(drawing, y + 4, [(kind, shapes[kind], "s11") for kind in kinds])
    ridge = ceiling.gflops / ceiling.gb_s
    low_x = min([ridge / 4, *(point.intensity for point in points)]) / 1.5
    high_x = max([ridge * 4, *(point.intensity for point in points)]) * 1.5
    low_y = min([ceiling.gb_s * low_x, *(point.gflops for point in points)]) / 1.5
    high_y = max([ceiling.gflops, *(point.gflops for point in points)]) * 1.8
    left, right, bottom = 70.0, WIDTH - _RIGHT, y + 350

    def place(x: float, gflops: float) -> tuple[float, float]:
        along = math.log(x / low_x) / math.log(high_x / low_x)
        up = math.log(gflops / low_y) / math.log(high_y / low_y)
        return left + along * (right - left), bottom - up * (bottom - y - 16)

    for tick in log_ticks(low_y, high_y):
        at = place(low_x, tick)[1]
        drawing.line([(left, at), (right, at)], "grid")
        drawing.text(left - 8, at + 4, tick_text(tick), kind="muted small", anchor="end")
    for tick in log_ticks(low_x, high_x):
        at = place(tick, low_y)[0]
        drawing.line([(at, y + 16), (at, bottom)], "grid")
        drawing.text(at, bottom + 17, tick_text(tick), kind="muted small", anchor="middle")
    drawing.text(12, y + 8, "GFLOP/s", kind="muted small")
    drawing.text((left + right) / 2, bottom + 36, "FLOP for each byte", kind="muted", anchor="middle")
    start = max(low_x, low_y / ceiling.gb_s)
    drawing.line(
        [place(start, ceiling.gb_s * start), place(ridge, ceiling.gflops), place(high_x, ceiling.gflops)], "roof"
    )
    end_x, end_y = place(high_x, ceiling.gflops)
    drawing.text(
        end_x - 4, end_y - 7, f"{ceiling.compute}: {number(ceiling.gflops)} GFLOP/s", kind="halo", anchor="end"
    )
    x, roof_y = place(math.sqrt(start * ridge), ceiling.gb_s * math.sqrt(start * ridge))
    words = f"{ceiling.memory}: {number(ceiling.gb_s)} GB/s"
    drawing.text(max(left + 6 + text_width(words), x - 8), roof_y - 8, words, kind="halo", anchor="end")
    for point in points:
        where = place(point.intensity, point.gflops)
        share = point.gflops / min(ceiling.gflops, ceiling.gb_s * point.intensity)
        tip = f"{point.name}, {point.series}: {number(point.gflops)} GFLOP/s, {share:.0%} of the roof"
        drawing.marker(*where, shapes[point.kind], f"s{numbers[point.series]}", tip)
    return drawing.svg(bottom + 46)

"""Pictures: stages, variants, scaled families, equation 3, growth of FLOPs (figures 3 and 8), results of searches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from effkernels.files import replacing
from effkernels.scaling.accuracies import Run
from effkernels.scaling.table import Table

# Okabe and Ito's colours, which readers with a colour vision deficiency can distinguish; every line has a marker too.
_STYLES = {
    "depth": ("#0072b2", "o"),
    "width": ("#e69f00", "s"),
    "resolution": ("#009e73", "^"),
    "compound": ("#d55e00", "D"),
}
_OTHER = ("#666666", "v")


def save_figure(table: Table, path: str | Path, runs: Sequence[Run] = ()) -> None:
    """Draw a table of `effkernels.scaling.tables` into a file.

    Args:
        table: its `name` decides what is drawn.
        path: the file; its suffix decides the format (PNG, SVG, PDF).
        runs: for the growth table, accuracies to draw over its FLOPs.

    Raises:
        ValueError: a table that has no figure.
        ImportError: matplotlib is not installed.
    """
    if not has_figure(table):
        raise ValueError(f"the table {table.name!r} has no figure; allowed: {', '.join(_DRAWINGS)}")
    figure = _figure()
    _DRAWINGS[table.name](figure, table, runs)
    _save(figure, path)


def scatter(
    path: str | Path,
    x: Sequence[float],
    y: Sequence[float],
    *,
    errors: Sequence[float] | None,
    labels: tuple[str, str, str],
    best: str,
) -> None:
    """Draw points into a file, the first of which is the best.

    Args:
        path: its suffix decides the format.
        x, y: of the points.
        errors: half the length of a bar on each.
        labels: title, of x, of y.
        best: name of the first point.
    """
    if not x:
        raise ValueError(f"{path}: nothing to draw; no candidate was evaluated")
    figure = _figure()
    figure.set_size_inches(7, 4.5)
    axes = figure.add_subplot()
    axes.errorbar(x, y, yerr=errors, fmt="o", color="#0072b2", ecolor="#b0c4de", markersize=5, label="candidates")
    axes.plot(x[:1], y[:1], "D", color="#d55e00", markersize=9, zorder=3, label=f"best: {best}")
    axes.set_title(labels[0], fontsize=10)
    axes.set_xlabel(labels[1])
    axes.set_ylabel(labels[2] + ("" if errors is None else " (bars: standard error)"))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    with replacing(path) as part:
        figure.savefig(part, dpi=150, facecolor="white")


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'effkernels[scaling]'") from error
    # No pyplot: the figure belongs to nobody, and a program's own figures and backend stay as they are.
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _numbers(table: Table, key: str, **wanted: str) -> list[float]:
    rows = [row for row in table.rows if all(row[name] == value for name, value in wanted.items())]
    return [float(row[key] or 0.0) for row in rows]


def _log_ticks(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_stages(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    figure.set_size_inches(_width(table, "layers"), 5.2)
    _stage_boxes(figure.add_subplot(), table, "")
    figure.suptitle(table.title, fontsize=11)


def _draw_scaled(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    """The baseline's stages above the scaled network's, on the same axes."""
    figure.set_size_inches(_width(table, "scaled_layers"), 9.2)
    above = figure.add_subplot(2, 1, 1)
    below = figure.add_subplot(2, 1, 2)
    _stage_boxes(above, table, "")
    _stage_boxes(below, table, "scaled_")
    above.set_title("baseline", fontsize=10)
    below.set_title("scaled", fontsize=10)
    limits = [axes.get_xlim() + axes.get_ylim() for axes in (above, below)]
    for axes in (above, below):  # one scale for both, so that what grew looks grown
        axes.set_xlim(0, max(limit[1] for limit in limits))
        axes.set_ylim(min(limit[2] for limit in limits), max(limit[3] for limit in limits))
    figure.suptitle(table.title, fontsize=11)


_ROOM = 0.9  # for the words on a stage of one layer, in layers


def _width(table: Table, key: str) -> float:
    """Inches for all layers side by side."""
    layers = _numbers(table, key)
    return min(24.0, max(7.0, 1.0 + 0.36 * (sum(layers) + _ROOM * len(layers))))


def _stage_boxes(axes: Any, table: Table, prefix: str) -> None:
    """A box per stage: as wide as it has layers, as high as its input (log), coloured and labelled by channels."""
    from matplotlib.colors import LogNorm

    all_channels = _numbers(table, "channels") + (_numbers(table, "scaled_channels") if table.name == "scaled" else [])
    norm = LogNorm(min(all_channels), max(max(all_channels), min(all_channels) * 2))
    palette = _colormap("YlGnBu")
    left, ticks, labels = 0.0, [], []
    smallest = min(_numbers(table, f"{prefix}height"))
    for row in table.rows:
        number, height = float(row[f"{prefix}channels"] or 1), float(row[f"{prefix}height"] or 1)
        layers = int(row[f"{prefix}layers"] or 1)
        wide = layers + _ROOM
        colour = palette(0.15 + 0.8 * float(norm(number)))
        axes.bar(left, height, wide, align="edge", bottom=0, color=colour, edgecolor="white", linewidth=2)
        for line in range(1, layers):
            axes.plot([left + wide * line / layers] * 2, [smallest / 100, height], color="white", linewidth=0.6)
        axes.text(left + wide / 2, height * 1.04, f"C={number:g}\nL={layers}", ha="center", va="bottom", fontsize=8)
        ticks.append(left + wide / 2)
        labels.append(str(row["operator"]).replace(", ", "\n"))
        left += wide
    axes.set_yscale("log")
    _log_ticks(axes.yaxis)
    axes.set_ylim(smallest / 3, max(_numbers(table, f"{prefix}height")) * 1.9)
    axes.set_xticks(ticks, labels, fontsize=8, rotation=90, linespacing=1.0)
    axes.set_xlim(0, left)
    axes.set_ylabel("height of the stage's input (pixels)")
    axes.spines[["top", "right"]].set_visible(False)


def _colormap(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name]


def _draw_variants(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    """Parameters over FLOPs, counted and as the paper prints them."""
    figure.set_size_inches(7, 5)
    axes = figure.add_subplot()
    flops, parameters = _numbers(table, "gflops"), _numbers(table, "parameters_m")
    axes.plot(flops, parameters, "-D", color=_STYLES["compound"][0], label="counted", zorder=2)
    axes.plot(
        _numbers(table, "paper_gflops"),
        _numbers(table, "paper_parameters_m"),
        "o",
        markersize=13,
        markerfacecolor="none",
        markeredgecolor="black",
        label="printed in the paper",
        zorder=3,
    )
    for row, x, y in zip(table.rows, flops, parameters, strict=True):
        axes.annotate(str(row["variant"]), (x, y), xytext=(12, -12), textcoords="offset points", fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _log_ticks(axes.xaxis)
    _log_ticks(axes.yaxis)
    axes.margins(0.1)
    axes.set_xlabel("billions of multiply-adds of one image")
    axes.set_ylabel("millions of parameters")
    axes.set_title(table.title, fontsize=11)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="upper left", frameon=False)


def _draw_families(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    """A group of bars per network: counted, and as the paper prints it."""
    names = list(dict.fromkeys(str(row["network"]) for row in table.rows))
    figure.set_size_inches(max(7.0, 3.1 * len(names)), 4.4)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        rows = [row for row in table.rows if row["network"] == name]
        counted = [float(row["gflops"] or 0) for row in rows]
        printed = [float(row["paper_gflops"] or 0) for row in rows]
        at = range(len(rows))
        colours = [_STYLES.get(str(row["way"]), _OTHER)[0] for row in rows]
        axes.bar([x - 0.2 for x in at], counted, 0.38, color=colours, label="counted")
        axes.bar([x + 0.2 for x in at], printed, 0.38, color="none", edgecolor="black", hatch="///", label="paper")
        for x, row, high in zip(at, rows, map(max, counted, printed), strict=True):
            axes.text(x, high * 1.02, _percent(row["difference"]), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(list(at), [_factors(row) for row in rows], fontsize=8)
        axes.set_ylim(0, max(counted + printed) * 1.12)
        axes.set_title(name, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.set_ylabel("billions of multiply-adds of one image")
    from matplotlib.patches import Patch

    handles = [Patch(facecolor="#888888"), Patch(facecolor="none", edgecolor="black", hatch="///")]
    figure.legend(
        handles, ["counted", "printed in the paper"], loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    figure.suptitle(table.title, fontsize=11)


def _percent(difference: Any) -> str:
    return f"{difference:+.0%}" if abs(difference) >= 0.005 else "0%"


def _factors(row: Any) -> str:
    words = [f"{letter}={row[key]:g}" for letter, key in zip("dwr", ("depth", "width", "resolution"), strict=True)]
    return "\n".join(word for word in words if not word.endswith("=1")) or "base"


def _draw_equation_3(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    """Depth, width and resolution over phi, by the formula and as published."""
    figure.set_size_inches(11, 4)
    phi = _numbers(table, "phi")
    for place, (key, word) in enumerate((("depth", "depth"), ("width", "width"), ("resolution", "pixels")), 1):
        axes = figure.add_subplot(1, 3, place)
        colour, _ = _STYLES[key]
        axes.plot(phi, _numbers(table, key), "-", color=colour, label="equation 3")
        axes.plot(phi, _numbers(table, f"published_{key}"), "o", color="black", label="published")
        axes.set_xticks(phi, [str(row["variant"]) for row in table.rows])
        axes.set_title(word, fontsize=10)
        axes.grid(True, alpha=0.3)
        axes.legend(loc="upper left", frameon=False, fontsize=9)
    figure.suptitle(table.title, fontsize=11)


def _draw_growth(figure: Any, table: Table, runs: Sequence[Run]) -> None:
    """Counted against predicted FLOPs, what they cost in memory, and accuracies over FLOPs where runs are given."""
    panels = 3 if runs else 2
    figure.set_size_inches(5 * panels, 4.6)
    ways = [way for way in _STYLES if any(row["way"] == way for row in table.rows)]
    base = next(row for row in table.rows if row["way"] == "baseline")

    axes = figure.add_subplot(1, panels, 1)
    for way in ways:
        colour, marker = _STYLES[way]
        x = [1.0, *_numbers(table, "predicted_growth", way=way)]
        axes.plot(x, [1.0, *_numbers(table, "counted_growth", way=way)], marker=marker, color=colour, label=way)
    ends = [1.0, max(_numbers(table, "predicted_growth"))]
    axes.plot(ends, ends, "--", color="black", linewidth=1, label="as predicted")
    axes.set_xlabel("FLOPs predicted by d w² r² (times the baseline's)")
    axes.set_ylabel("FLOPs counted (times the baseline's)")
    _finish(axes)

    axes = figure.add_subplot(1, panels, 2)
    for way in ways:
        colour, marker = _STYLES[way]
        x = [float(base["gflops"] or 0), *_numbers(table, "gflops", way=way)]
        y = [float(base["activation_mb"] or 0), *_numbers(table, "activation_mb", way=way)]
        axes.plot(x, y, marker=marker, color=colour, label=way)
    axes.set_xlabel("billions of multiply-adds of one image")
    axes.set_ylabel("MB kept for the backward of one image")
    _finish(axes)

    if runs:
        axes = figure.add_subplot(1, panels, 3)
        for way in dict.fromkeys(run.way for run in runs if run.way != "baseline"):
            colour, marker = _STYLES.get(way, _OTHER)
            points = sorted((run.gflops, run.accuracy) for run in runs if run.way in (way, "baseline"))
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=way)
        for run in runs:
            if run.way == "baseline":
                axes.plot(run.gflops, run.accuracy, "o", color="black", label="baseline", zorder=3)
        axes.set_xlabel("billions of multiply-adds of one image")
        axes.set_ylabel("accuracy of the user's own runs")
        _finish(axes, log_y=False, place="lower right")
    figure.suptitle(table.title, fontsize=11)


def _finish(axes: Any, log_y: bool = True, place: str = "upper left") -> None:
    axes.set_xscale("log")
    _log_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc=place, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def has_figure(table: Table) -> bool:
    """Return whether `save_figure` can draw the table."""
    return table.name in _DRAWINGS


_DRAWINGS: dict[str, Callable[[Any, Table, Sequence[Run]], None]] = {
    "stages": _draw_stages,
    "scaled": _draw_scaled,
    "variants": _draw_variants,
    "families": _draw_families,
    "equation3": _draw_equation_3,
    "growth": _draw_growth,
}

"""A grid of pictures with their maps laid over them, as a PNG, PDF or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from effkernels.files import replacing

MOST_ROWS = 64  # of a figure: 150 dots per inch and 2.5 inches a row stay far below the 65536 pixels that Agg can draw
_PANEL = 2.3  # inches
_PALETTE = "turbo"


@dataclass(frozen=True)
class Panel:
    """One picture of the grid.

    Attributes:
        picture: (H, W, 3), red, green, blue in [0, 1].
        heat: (H, W) in [0, 1], laid over the picture; None: the picture alone.
        caption: below it.
    """

    picture: Tensor
    heat: Tensor | None
    caption: str


def figure_formats() -> list[str]:
    """Return the suffixes that `save_grid` can write, without the dot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return sorted(_figure().canvas.get_supported_filetypes())


def save_grid(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[Panel]]) -> None:
    """Draw a grid.

    Args:
        path: of the file; its suffix decides the format.
        columns: a title for each column.
        rows: as many panels each as there are columns; at most `MOST_ROWS`.

    Raises:
        ValueError: no row, too many, or one of another length.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written; one that was there is as it was.
    """
    if not 1 <= len(rows) <= MOST_ROWS:
        raise ValueError(f"save_grid: {len(rows)} rows; allowed: 1 to {MOST_ROWS}")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"save_grid: a row has {len(row)} panels, and there are {len(columns)} titles; needed: the same number"
            )
    figure = _figure()
    figure.set_size_inches(len(columns) * _PANEL + 0.6, len(rows) * (_PANEL + 0.25) + 0.6)
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    heat = None
    for across, row in zip(grid, rows, strict=True):
        for axes, panel in zip(across, row, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            for edge in axes.spines.values():
                edge.set_visible(False)
            axes.set_xlabel(panel.caption, fontsize=8, parse_math=False)  # a "$" of a file name is a letter
            if panel.heat is None:
                axes.imshow(panel.picture.numpy())
                continue
            # Colours belong to the map: the picture below is grey, and shines through most where the map is low.
            grey = panel.picture.mean(2, keepdim=True).expand(-1, -1, 3)
            axes.imshow(grey.numpy())
            values = panel.heat.numpy()
            heat = axes.imshow(values, cmap=_PALETTE, vmin=0, vmax=1, alpha=0.3 + 0.3 * values)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9, parse_math=False)
    if heat is not None:
        from matplotlib.cm import ScalarMappable

        scale = ScalarMappable(heat.norm, heat.cmap)  # of its own: a bar cannot show an alpha per pixel
        bar = figure.colorbar(scale, ax=grid[:, -1], fraction=0.05, pad=0.03, ticks=[0, 1])
        bar.ax.set_yticklabels(["least", "most"], fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, dpi=150, facecolor="white")


def _figure() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'effkernels[scaling]'") from error
    # Without pyplot, whose state belongs to the user's own program.
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    return figure

"""The log of a training, a line of JSON for each epoch, and the plot of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effkernels.files import append_text, replacing, write_text

Record = dict[str, Any]


class Log:
    """A file of lines; what could not be written, as on a full disk, is written with the next line."""

    def __init__(self, file: Path, records: Sequence[Record]) -> None:
        """Start with the records of the epochs that are done: lines of epochs after the checkpoint are taken away.

        Raises:
            OSError: the file cannot be written.
        """
        self._file = file
        self._waiting = ""
        text = "".join(map(_line, records))
        if not file.exists() or file.read_bytes() != text.encode():
            write_text(file, text)

    def add(self, record: Record) -> None:
        """Append the record of an epoch.

        Raises:
            OSError: the file cannot be written.
        """
        self._waiting += _line(record)
        append_text(self._file, self._waiting)
        self._waiting = ""


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def save_plot(file: Path, records: Sequence[Record], title: str) -> None:
    """Draw the losses and the accuracy over the epochs.

    Args:
        file: its suffix decides the format.
        records: of the epochs, in order.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'effkernels[train]'") from error
    # Without pyplot, whose state belongs to the user's own program.
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    for key, label, colour, marker in (
        ("train_loss", "training images", "#0072b2", "o"),
        ("loss", "images held out", "#d55e00", "D"),
    ):
        left.plot(epochs, [record[key] for record in records], marker=marker, markersize=3, color=colour, label=label)
    left.set_ylabel("cross-entropy")
    left.legend(frameon=False)
    right.plot(epochs, [record["accuracy"] for record in records], "D-", markersize=3, color="#d55e00")
    right.set_ylabel("accuracy of images held out")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(file) as part:
        figure.savefig(part, dpi=120, facecolor="white")

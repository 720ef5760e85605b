"""Tables and progress on a terminal: rich where it is installed, plain text otherwise.

Names come from files and users: everything printed here goes through `effkernels.files.printable`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from effkernels.files import printable, printable_lines

try:
    import rich.console
    import rich.markup
    import rich.progress
    import rich.table
    import rich.text

    HAVE_RICH = True
except ImportError:  # rich is in the bench extra; info, check and predict work without it
    HAVE_RICH = False

Advance = Callable[[str], None]

# Without a terminal, a step is printed if nothing was for this long.
_SECONDS_OF_SILENCE = 5.0
# A bar is drawn anew by the step that ends this long after the last drawing: no thread of its own does it.
_SECONDS_OF_A_BAR = 0.1


def note(message: str) -> None:
    """Print lines on standard error: standard output is for tables and JSON only."""
    print(printable_lines(message), file=sys.stderr, flush=True)


def say(message: str) -> None:
    """Print lines on standard output."""
    print(printable_lines(message))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, gap: str = "  ") -> None:
    """Print a table on standard output; the first column and those that hold no number are aligned to the left.

    Args:
        gap: between two columns.
    """
    title, columns, rows = printable(title), list(map(printable, columns)), [list(map(printable, row)) for row in rows]
    right = [i > 0 and any(row[i][:1].isdigit() for row in rows) for i in range(len(columns))]
    if HAVE_RICH and sys.stdout.isatty():
        shown = rich.table.Table(title=title, title_justify="left", padding=(0, len(gap) - 1))
        for name, is_number in zip(columns, right, strict=True):
            shown.add_column(name, justify="right" if is_number else "left")
        for row in rows:
            # Text, not markup: a file called "[red].png" is a name, not a colour.
            shown.add_row(*(rich.text.Text(cell) for cell in row))
        rich.console.Console().print(shown)
        return
    # A file or a pipe gets plain text of the full width: rich would cut it at 80 columns.
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(title)
    for row in [columns, ["-" * width for width in widths], *rows]:
        cells = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, right, strict=True)
        )
        print(gap.join(cells).rstrip())


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """Show a progress bar on standard error; the block gets a function that takes the name of the step just done.

    Without a terminal a line is printed for every tenth of the steps, and for a step that ends five seconds or more
    after the line before, so that a log shows the progress without filling up.
    """
    if HAVE_RICH and sys.stderr.isatty():
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(
            *columns, console=rich.console.Console(stderr=True), transient=True, auto_refresh=False
        ) as bar:
            task = bar.add_task(title, total=total)
            shown = 0.0

            def advance_bar(step: str) -> None:
                nonlocal shown
                now = time.monotonic()
                is_due = now - shown >= _SECONDS_OF_A_BAR
                shown = now if is_due else shown
                description = f"{title}: {rich.markup.escape(printable(step))}"
                bar.update(task, advance=1, description=description, refresh=is_due)

            yield advance_bar
        return

    done = 0
    printed = time.monotonic()

    def advance_plain(step: str) -> None:
        nonlocal done, printed
        done += 1
        is_tenth = done == total or done * 10 // max(total, 1) != (done - 1) * 10 // max(total, 1)
        now = time.monotonic()
        if is_tenth or now - printed >= _SECONDS_OF_SILENCE:
            printed = now
            note(f"{title}: {done}/{total} {step}")

    yield advance_plain

"""``effkernels report``: results of the benchmarks as a page with pictures and tables."""

from __future__ import annotations

import argparse
from pathlib import Path

from effkernels import console
from effkernels.bench.timing import Row, read_rows
from effkernels.commands.common import UsageError, check_output, reading, writing
from effkernels.files import printable, write_text
from effkernels.report import measured
from effkernels.report.svg import standalone

TEXT = "Draw results of `bench`: one page of HTML with tables and pictures, or the pictures as SVG files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("rows", nargs="+", metavar="ROWS.jsonl", help="rows of `bench --results-file`")
    parser.add_argument("--html", metavar="FILE", help="write the page: one file, without scripts")
    parser.add_argument("--svg", metavar="FOLDER", help="write each picture into this folder")
    parser.add_argument("--force", action="store_true", help="overwrite files that exist")


def run(arguments: argparse.Namespace) -> int:
    """Write a page or pictures of result rows."""
    if not (arguments.html or arguments.svg):
        raise UsageError("nothing to write; allowed: --html FILE, --svg FOLDER or both")
    rows: list[Row] = []
    for name in arguments.rows:
        with reading("ROWS.jsonl", name):
            try:
                rows += read_rows(Path(name))
            except ValueError as error:
                raise UsageError(str(error)) from error
    if not rows:
        raise UsageError(f"{', '.join(map(printable, arguments.rows))}: no rows")
    texts: dict[tuple[str, Path], str] = {}
    if arguments.html:
        page = check_output("--html", arguments.html, force=arguments.force, suffixes=(".html", ".htm"))
        texts["--html", page] = measured.page(rows).html()
    if arguments.svg:
        folder = Path(arguments.svg)
        with writing("--svg", folder):
            folder.mkdir(parents=True, exist_ok=True)
        for picture in measured.all_pictures(rows):
            file = check_output("--svg", folder / f"{picture.name}.svg", force=arguments.force)
            texts["--svg", file] = standalone(picture.svg)
    for (flag, file), text in texts.items():
        with writing(flag, file):
            write_text(file, text)
        console.note(f"report: {printable(file)}")
    return 0

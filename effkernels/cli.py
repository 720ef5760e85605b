"""The command line: ``effkernels info | check | bench | compare | report | predict | explain | tune | convert |
export | scale | search | cam | train``.

Flags have timm's names if it has them.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import effkernels
from effkernels import console
from effkernels.commands import (
    bench,
    cam,
    check,
    compare,
    convert,
    explain,
    export,
    info,
    predict,
    report,
    scale,
    search,
    train,
    tune,
)
from effkernels.commands.common import UsageError
from effkernels.files import printable_lines


class Command(Protocol):
    """The interface of a module of ``effkernels.commands``."""

    TEXT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; the exit status is returned."""


COMMANDS: dict[str, Command] = {
    "info": info,
    "check": check,
    "bench": bench,
    "compare": compare,
    "report": report,
    "predict": predict,
    "explain": explain,
    "tune": tune,
    "convert": convert,
    "export": export,
    "cam": cam,
    "scale": scale,
    "search": search,
    "train": train,
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without obeying what an argument holds: names from a shell's pattern may hold anything."""

    def error(self, message: str) -> NoReturn:
        super().error(printable_lines(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="effkernels", description="Fused MBConv operators and EfficientNet.")
    parser.add_argument("--version", action="version", version=f"effkernels {effkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.TEXT, description=command.TEXT))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is returned, wrong arguments exit with 2 as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal does not have ends no command
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        status = COMMANDS[parsed.command].run(parsed)
        sys.stdout.flush()  # a full disk is said now, and not by a traceback at the exit
        return status
    except UsageError as error:
        parser.exit(2, f"effkernels {parsed.command}: {printable_lines(error)}\n")
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        _discard_output()
        return 1
    except OSError as error:
        # Errors of files that the commands open have a file name; an error without one is of standard output.
        where = error.filename or "standard output"
        _discard_output()
        console.note(f"effkernels {parsed.command}: {f'{where}: {error.strerror}' if error.strerror else error}")
        return 1
    except KeyboardInterrupt:
        return 130


def _discard_output() -> None:
    """Give up standard output if it accepts nothing more: at exit Python would try again and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

"""The command line: ``effkernels info | check | bench | predict | explain | tune | convert | export | scale | search |
cam``.

Flags have timm's names if it has them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

import effkernels
from effkernels.commands import bench, cam, check, convert, explain, export, info, predict, scale, search, tune
from effkernels.commands.common import UsageError


class Command(Protocol):
    """What a module of ``effkernels.commands`` offers."""

    TEXT: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's flags."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the command; the exit status is returned."""


COMMANDS: dict[str, Command] = {
    "info": info,
    "check": check,
    "bench": bench,
    "predict": predict,
    "explain": explain,
    "tune": tune,
    "convert": convert,
    "export": export,
    "cam": cam,
    "scale": scale,
    "search": search,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effkernels", description="Fused MBConv operators and EfficientNet.")
    parser.add_argument("--version", action="version", version=f"effkernels {effkernels.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.TEXT, description=command.TEXT))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is returned, wrong arguments exit with 2 as argparse does."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        return COMMANDS[parsed.command].run(parsed)
    except UsageError as error:
        parser.exit(2, f"effkernels {parsed.command}: {error}\n")
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130

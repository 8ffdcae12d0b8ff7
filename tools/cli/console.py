"""How the command line speaks: results on standard output, progress and errors on standard error."""

import logging
import os
import sys
from enum import IntEnum
from typing import NoReturn

import typer
from rich.console import Console

PLAIN_WIDTH = 140
"""Columns of what is written to a file or a pipe, unless COLUMNS says otherwise."""

out = Console(highlight=False, width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH)
err = Console(stderr=True, highlight=False)


class Exit(IntEnum):
    """Exit codes of every subcommand; 2 is Typer's, for a wrong usage."""

    FAILED = 1
    NOT_RUNNING = 3
    TIMED_OUT = 4


def say(line: str) -> None:
    """A line of progress."""
    err.print(line, markup=False, soft_wrap=True)


def fail(message: str, *, remedy: str = "", code: Exit = Exit.FAILED) -> NoReturn:
    """Say what went wrong and what to do, and leave.

    Raises:
        typer.Exit: always.
    """
    err.print("error:", style="bold red", end=" ")
    err.print(message, markup=False, soft_wrap=True)
    if remedy:
        err.print(remedy, markup=False, soft_wrap=True)
    raise typer.Exit(code)


def quiet_clients() -> None:
    """Keep the Kafka client's own log off the terminal: what it reports is raised as well, and told better."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)

"""The command line. ``main`` lists the commands. Each imports what it needs when it runs, so that help is fast."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn, TypeVar

Function = TypeVar("Function", bound=Callable)


class Code(IntEnum):
    """Exit codes of all commands."""

    FINE = 0
    FINDING = 1  # the command worked and found a problem: an invalid policy file, an attention left alone (--strict)
    USAGE = 2  # it could not run: an option, name or file is wrong, or a package is missing


def fail(code: Code, message: str) -> NoReturn:
    """Print an error on standard error, and exit."""
    import typer

    typer.secho("error: ", fg="red", err=True, nl=False)
    typer.echo(message, err=True)
    raise typer.Exit(code)


def paragraphs(function: Function) -> Function:
    """Join the lines of each paragraph of the docstring, so that help is wrapped to the terminal's width."""
    function.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
    return function

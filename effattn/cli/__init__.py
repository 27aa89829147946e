"""The command line. ``main`` lists the commands; each imports what it needs only when it runs, so that help is fast."""

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
    FINDING = 1  # the command did its work and found a problem: a wrong policy file, an attention left alone (--strict)
    USAGE = 2  # it could not: an option, name or file is wrong, or a package is missing


def fail(code: Code, message: str) -> NoReturn:
    """Say what is wrong on standard error, and exit."""
    import typer

    typer.secho("error: ", fg="red", err=True, nl=False)
    typer.echo(message, err=True)
    raise typer.Exit(code)


def paragraphs(function: Function) -> Function:
    """Join the lines of each paragraph of the docstring: the help text is wrapped to the terminal, not to our files."""
    function.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
    return function

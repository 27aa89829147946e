"""The command line. ``main`` lists the commands; each imports what it needs only when it runs, so that help is fast."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def paragraphs(function: Function) -> Function:
    """Join the lines of each paragraph of the docstring: the help text is wrapped to the terminal, not to our files."""
    function.__doc__ = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(function.__doc__ or ""))
    return function

"""Environment variables, in one table, and output to the user: logging and warnings.

Values are validated when first read. An invalid one raises :class:`effattn.errors.OptionError` with the allowed values.
"""

from __future__ import annotations

import logging
import os
import pathlib
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from effattn.errors import OptionError

DEBUG_LEVELS = {
    0: "quiet",
    1: "one line per attention site",
    2: "and the reason of every choice and refusal",
    3: "and the graph before and after",
    4: "and the Triton source of every kernel",
}
DEBUG_PASSES = "passes"
SWITCH = {"0": False, "1": True}


@dataclass(frozen=True)
class Variable:
    """An environment variable, the field of :class:`Settings` that it sets, and its meaning."""

    name: str
    field: str
    parse: Callable[[str], Any]
    default: Any
    allowed: str
    meaning: str


@dataclass(frozen=True)
class Debug:
    """What to log: up to which level, and whether to log what each pass does."""

    level: int = 0
    passes: bool = False


@dataclass(frozen=True)
class Settings:
    """The validated environment variables."""

    debug: Debug
    cache_dir: pathlib.Path | None  # None: the platform's cache directory
    precise: bool  # tanh to single precision on 16-bit tensors, too


def _debug(text: str) -> Debug:
    words = [word.strip() for word in text.split(",")]
    levels = [int(word) for word in words if word != DEBUG_PASSES]
    if len(levels) > 1 or any(level not in DEBUG_LEVELS for level in levels):
        raise ValueError(text)
    return Debug(levels[0] if levels else 0, DEBUG_PASSES in words)


def _directory(text: str) -> pathlib.Path:
    if "\0" in text:
        raise ValueError(text)
    return pathlib.Path(os.path.abspath(os.path.expanduser(text)))


VARIABLES = (
    Variable(
        name="EFFATTN_DEBUG",
        field="debug",
        parse=_debug,
        default=Debug(),
        allowed="0, 1, 2, 3 or 4, passes, or both: 1,passes",
        meaning="how much to log on standard error: "
        + "; ".join(f"{level} {text}" for level, text in DEBUG_LEVELS.items())
        + f"; {DEBUG_PASSES}: what each pass changed in the graph",
    ),
    Variable(
        name="EFFATTN_CACHE_DIR",
        field="cache_dir",
        parse=_directory,
        default=None,
        allowed="a path",
        meaning="directory of generated kernels (default: the platform's user cache directory)",
    ),
    Variable(
        name="EFFATTN_PRECISE",
        field="precise",
        parse=lambda text: SWITCH[text],
        default=False,
        allowed="0 or 1",
        meaning="1: kernels compute the tanh of scores to single precision; else, on Hopper and 16-bit tensors, with "
        "the chip's own instruction (relative error 2**-11)",
    ),
)


def current() -> Settings:
    """The settings of this process. Each distinct environment is read and validated once.

    Raises:
        OptionError: a variable has an invalid value.
    """
    return _read(tuple(os.environ.get(variable.name, "") for variable in VARIABLES))


@lru_cache(maxsize=16)
def _read(texts: tuple[str, ...]) -> Settings:
    values = {}
    for variable, text in zip(VARIABLES, texts, strict=True):
        if not text.strip():  # an empty variable counts as unset
            values[variable.field] = variable.default
            continue
        try:
            values[variable.field] = variable.parse(text.strip())
        except (ValueError, KeyError) as error:
            raise OptionError(f"{variable.name}={text!r} is not valid; allowed: {variable.allowed}") from error
    return Settings(**values)


_SPEAKING = threading.Lock()  # guards _told and the handler
logger = logging.getLogger("effattn")
logger.addHandler(logging.NullHandler())


class _StandardError(logging.StreamHandler):
    """Writes to the current ``sys.stderr``, which may be replaced after import."""

    def __init__(self):
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("[effattn] %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def show(level: int, text: str) -> None:
    """Log ``text`` if EFFATTN_DEBUG is at least ``level`` (see ``DEBUG_LEVELS``)."""
    if current().debug.level >= level:
        log(text)


def log(text: str) -> None:
    """Log ``text`` to the logger "effattn"."""
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    # if the application has set up logging, its handlers get the records; otherwise add one, so that they are not lost
    with _SPEAKING:
        if not logging.getLogger().handlers and all(
            isinstance(handler, logging.NullHandler) for handler in logger.handlers
        ):
            logger.addHandler(_StandardError())
    logger.info(text)


_told: set[str] = set()


def warn_once(message: str, key: str | None = None) -> None:
    """Issue one ``RuntimeWarning`` per process for each ``key`` (by default the message)."""
    key = message if key is None else key
    with _SPEAKING:
        if key in _told:
            return
        _told.add(key)
    warnings.warn(message, RuntimeWarning, stacklevel=3)

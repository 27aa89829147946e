"""Errors on their way out of Dynamo, which wraps what a backend raises unless it is of a class of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from effattn.errors import EffattnError


def as_they_are(backend: Callable) -> Callable:
    """Let users of ``torch.compile`` catch the errors that effattn raises on purpose by their class.

    Dynamo makes ``BackendCompilerFailed`` of all but ``ShortenTraceback``, whose traceback it also cuts to the part
    after its own frames.
    """

    @functools.wraps(backend)
    def raising(*args: Any, **kwargs: Any) -> Any:
        try:
            return backend(*args, **kwargs)
        except EffattnError as error:
            kind: Any = type(error)
            twin = _twin(kind)(str(error), first_useful_frame=inspect.currentframe())
            twin.__dict__.update(vars(error))
            raise twin from None

    return raising


@functools.lru_cache
def _twin(kind: Any) -> Any:
    """A class of the same name that is both ``kind`` and one that Dynamo lets through."""
    from torch._dynamo.exc import ShortenTraceback  # here, because it takes a second to import

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "args": property(lambda self: (str(self),), lambda self, value: None),  # Dynamo would add its stack to them
        "__reduce__": lambda self: (kind, self.args),
    }
    return type(kind.__name__, (kind, ShortenTraceback), body)

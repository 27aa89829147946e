"""Lets effattn's errors pass through Dynamo, which wraps most exceptions of a backend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from effattn.errors import EffattnError
from effattn.versions import let_through


def as_they_are(backend: Callable) -> Callable:
    """Raise effattn's errors so that users of ``torch.compile`` can catch them by type.

    Dynamo converts exceptions to ``BackendCompilerFailed``, except for ``ShortenTraceback``, whose traceback it cuts
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
    """A class with the same name that derives from ``kind`` and from one that Dynamo lets through."""
    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "args": property(lambda self: (str(self),), lambda self, value: None),  # keeps Dynamo from adding its stack
        "__reduce__": lambda self: (kind, self.args),
    }
    return type(kind.__name__, (kind, let_through()), body)

"""Small calls on the CPU as long ones are computed: in strips, by SDPA's flash kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from effattn.runtime.targets.portable import flash, shares, strips, tilings


@contextmanager
def small_strips() -> Iterator[None]:
    """Calls of any size, with 16 queries per chunk and 8 tokens per block."""
    shares._plan_once.cache_clear()
    with (
        mock.patch.object(flash, "LEAST_PAIRS", 0),
        mock.patch.object(strips, "ALONE", 8),
        mock.patch.object(shares, "HEIGHTS", (16,)),
        mock.patch.object(tilings, "BLOCK", 8),
    ):
        yield
    shares._plan_once.cache_clear()

"""Wall time of calls, including the device's work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from effattn.runtime.machine import in_use


@dataclass(frozen=True)
class Timing:
    """Seconds of a function's first call (with compilation) and of later calls."""

    first: float
    later: tuple[float, ...]
    value: Any  # result of the last call

    @property
    def median(self) -> float:
        return statistics.median(self.later) if self.later else self.first


def timed(function: Callable[[], Any], repeats: int = 1) -> Timing:
    """Call ``function`` 1 + ``repeats`` times, and time every call."""
    seconds = []
    value = None
    for _ in range(1 + repeats):
        value = None  # free it first, so that two results never coexist
        wait()
        start = time.perf_counter()
        value = function()
        wait()
        seconds.append(time.perf_counter() - start)
    return Timing(seconds[0], tuple(seconds[1:]), value)


def wait() -> None:
    """Synchronise with the GPU if one is in use."""
    for device in in_use():
        device.synchronize()

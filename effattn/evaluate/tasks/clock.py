"""Wall time of a call, the device's work included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of a function's first call (compilation included) and of the later ones."""

    first: float
    later: tuple[float, ...]
    value: Any  # what the last call returned

    @property
    def median(self) -> float:
        return statistics.median(self.later) if self.later else self.first


def timed(function: Callable[[], Any], repeats: int = 1) -> Timing:
    """Call ``function`` once and then ``repeats`` times more, and time every call."""
    seconds = []
    value = None
    for _ in range(1 + repeats):
        value = None  # so that two results are never held at once
        wait()
        start = time.perf_counter()
        value = function()
        wait()
        seconds.append(time.perf_counter() - start)
    return Timing(seconds[0], tuple(seconds[1:]), value)


def wait() -> None:
    """Until a GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()

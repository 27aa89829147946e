"""Time and memory of one function, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from effattn.evaluate.tasks.clock import wait
from effattn.lowering.device import device_type
from effattn.runtime.machine import memory_statistics

FEWEST, MOST = 3, 200


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls."""

    median: float
    fastest: float
    runs: int
    peak_bytes: int | None  # largest memory above what was allocated before; None where nobody counts


def timed(function: Callable[[], Any], device: torch.device, seconds: float) -> Timing:
    """Call ``function`` once to warm up, then for about ``seconds``: on a GPU between events, else by the clock."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    once = time.perf_counter() - start
    runs = max(FEWEST, min(MOST, int(seconds / max(once, 1e-6))))
    memory = memory_statistics(device)
    before = 0
    if memory is not None:
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
    times = _by_clock(function, runs) if device_type(device.type).on_host else _by_events(function, device, runs)
    peak = None if memory is None else memory.max_memory_allocated(device) - before
    return Timing(statistics.median(times), min(times), runs, peak)


def _by_events(function: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    """The host runs ahead of the device, as it does in use."""
    module = torch.get_device_module(device)
    events = [[module.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    module.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def _by_clock(function: Callable[[], Any], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return times

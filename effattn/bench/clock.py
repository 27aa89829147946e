"""Time of functions that are called in turns, and the memory of one, on any device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effattn.evaluate.tasks.clock import wait
from effattn.lowering.device import device_type
from effattn.runtime.machine import memory_statistics

FEWEST, MOST = 3, 200
ROUNDS = 5

Function = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls."""

    median: float
    fastest: float
    runs: int


def peak_bytes(function: Function, device: torch.device) -> int | None:
    """The largest memory of a call above what was allocated before; None where nobody counts."""
    wait()
    memory = memory_statistics(device)
    if memory is None:
        return None
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    function()
    wait()
    return memory.max_memory_allocated(device) - before


def timed(functions: Sequence[Function], device: torch.device, seconds: float) -> list[Timing | Exception]:
    """The time of each, from about ``seconds`` of calls, after one to warm up; or what it raised.

    They are called in turns, some calls of one and then of the next, since a device that gets hot gets slow, and would
    favour those that are timed first. On a GPU calls are timed between events, else by the clock.
    """
    runs: dict[int, int] = {}
    times: dict[int, list[float]] = {number: [] for number in range(len(functions))}
    failed: dict[int, Exception] = {}

    def tried(number: int, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # one that fails must not take the others with it
            failed[number] = error

    for number, function in enumerate(functions):
        once = tried(number, lambda function=function: _once(function))  # type: ignore[misc]
        if once is not None:
            runs[number] = max(FEWEST, min(MOST, int(seconds / max(once, 1e-6))))
    measure = _by_clock if device_type(device.type).on_host else _by_events
    for number, count in _turns(runs):
        if number not in failed:
            found = tried(number, lambda: measure(functions[number], device, count))  # noqa: B023
            times[number] += found or []
    return [
        failed[number] if number in failed else Timing(statistics.median(each), min(each), len(each))
        for number, each in times.items()
    ]


def _once(function: Function) -> float:
    """Seconds of a call."""
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def _turns(runs: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(number of a function, how many calls now), until each has had its ``runs``."""
    for turn in range(ROUNDS):
        for number, count in runs.items():
            now = count * (turn + 1) // ROUNDS - count * turn // ROUNDS
            if now:
                yield number, now


def _by_events(function: Function, device: torch.device, runs: int) -> list[float]:
    """The host runs ahead of the device, as it does in use."""
    module = torch.get_device_module(device)
    events = [[module.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    module.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def _by_clock(function: Function, device: torch.device, runs: int) -> list[float]:
    return [1e3 * _once(function) for _ in range(runs)]

"""Time and memory of one function, and what the machine is that they were measured on."""

from __future__ import annotations

import contextlib
import gc
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
LONGEST = 4.0  # seconds of repeats after which a function has been timed well enough
FEWEST = 3
SHORTEST = 0.1  # seconds of repeats on a GPU, whatever was asked for: a few calls of a millisecond are mostly noise
REST = 3.0  # seconds of idling before a GPU is timed: what ran before must not leave it hotter for what comes after
CHUNK = 1 << 26  # elements compared at once


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated calls, and the memory they needed."""

    median: float
    fastest: float
    runs: int
    peak_gib: float | None


def timed(function: Callable[[], Any], device: torch.device, repeats: int) -> Timing:
    """Call ``function`` once to warm up, then up to ``repeats`` times (for LONGEST seconds, FEWEST times at least).

    On a GPU short functions are called more often, for SHORTEST seconds.
    """
    once, _ = wall_seconds(function, device)
    runs = max(FEWEST, min(repeats, int(LONGEST / max(once, 1e-6))))
    if device.type != "cuda":
        times = [1e3 * wall_seconds(function, device)[0] for _ in range(runs)]
        return Timing(statistics.median(times), min(times), runs, None)
    if once > 1e-2:
        time.sleep(REST)
    runs = max(runs, int(SHORTEST / max(once, 1e-3)))
    torch.cuda.reset_peak_memory_stats(device)
    times = _event_times(function, device, runs)
    return Timing(statistics.median(times), min(times), runs, torch.cuda.max_memory_allocated(device) / GIB)


def _event_times(function: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    """Milliseconds between events around each call. The host runs ahead of the device, as it does in use."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def wall_seconds(function: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call by the clock on the wall, until the device is idle again, and its value."""
    _wait(device)
    start = time.perf_counter()
    value = function()
    _wait(device)
    return time.perf_counter() - start, value


def allocated_gib(device: torch.device) -> float:
    """Memory in use now; 0 on the CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference, computed piece by piece. NaN in one alone counts as infinite."""
    worst = 0.0
    for a, b in zip(one.flatten().split(CHUNK), other.flatten().split(CHUNK), strict=True):
        a, b = a.float(), b.float()
        apart = (a - b).abs()
        apart = torch.where(a.isnan() & b.isnan(), 0.0, apart).nan_to_num(nan=torch.inf)
        worst = max(worst, apart.max().item())
    return worst


def forget(device: torch.device) -> None:
    """Free what the last variant held: compiled code, graphs, memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def graphs_not_captured() -> int:
    """How many CUDA graphs Inductor was asked for and did not make (as when a graph changes its inputs)."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """The commit that this tree is at, with a + where files differ from it; None outside a checkout."""
    folder = pathlib.Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "effattn").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

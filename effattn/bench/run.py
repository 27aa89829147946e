"""Problems times peers: every one built, compared, timed."""

from __future__ import annotations

import datetime
import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

import effattn
from effattn.bench.clock import Timing, peak_bytes, timed
from effattn.bench.peers import EFFATTN, Given, Peer
from effattn.bench.problem import Pairs, Problem, flops, traffic
from effattn.evaluate.bodies import quiet
from effattn.runtime.machine import in_use, name_of

Parts = tuple[Tensor, ...]
FORWARD, BACKWARD = "forward", "backward"
# largest difference between two results over the largest value: rounding of the weights, and of the products
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@dataclass(frozen=True)
class Row:
    """One peer on one problem, forward or backward."""

    problem: str
    tokens: int
    direction: str
    peer: str
    ms: float | None = None  # median
    fastest: float | None = None
    runs: int = 0
    tflops: float | None = None  # of the products over allowed pairs
    over_effattn: float | None = None  # ms over effattn's
    peak_gib: float | None = None  # above inputs and outputs
    difference: float | None = None  # from effattn's result: the largest, over the largest value
    tolerated: float | None = None
    options: str | None = None  # of its kernels, where it does not run by its own choice
    why_not: str | None = None  # it cannot compute the problem
    error: str | None = None  # it failed

    @property
    def wrong(self) -> bool:
        """Whether the result is another one than effattn's."""
        return self.difference is not None and not self.difference <= (self.tolerated or 0.0)


@dataclass(frozen=True)
class Bench:
    """All that was measured, and on what."""

    about: dict[str, Any]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "about": self.about, "rows": [asdict(row) for row in self.rows]}


def bench(
    problems: Sequence[Problem],
    peers: Sequence[Peer],
    *,
    backward: bool = False,
    seconds: float = 0.5,
    tell: Callable[[str], None] = lambda text: None,
    done: Callable[[], None] = lambda: None,
) -> Bench:
    """Time every peer on every problem.

    Args:
        seconds: of repeated calls for each figure.
        tell, done: called before a piece of work with what it is, and after it.
    """
    rows: list[Row] = []
    work: dict[str, dict[str, Any]] = {}
    directions = (FORWARD, BACKWARD) if backward else (FORWARD,)
    for problem in problems:
        pairs = Pairs.of(problem, problem.make_mask(problem))
        work[problem.name] = {"density": pairs.density} | {
            direction: {
                "flops": flops(problem, pairs.density, direction == BACKWARD),
                "bytes": traffic(problem, direction == BACKWARD),
            }
            for direction in directions
        }
        for direction in directions:
            rows += _side_by_side(problem, peers, direction, seconds, pairs, tell, done)
    return Bench(about(problems, work), tuple(_with_ratios(rows)))


def _side_by_side(
    problem: Problem,
    peers: Sequence[Peer],
    direction: str,
    seconds: float,
    pairs: Pairs,
    tell: Callable[[str], None],
    done: Callable[[], None],
) -> list[Row]:
    """A row for each peer: each is built and compared, then all are timed in turns."""
    device, reference = torch.device(problem.device), None
    rows: list[Row] = []
    functions: dict[int, Callable[[], Parts]] = {}  # by the place of its row
    with quiet(), freed():
        for peer in peers:
            where = (problem.name, problem.tokens, direction, peer.name)
            given = Given(problem, problem.make_mask(problem), problem.make_score(problem), direction == BACKWARD)
            if (reason := peer.why_not(given)) is not None:
                rows.append(Row(*where, why_not=reason))
            else:
                tell(f"{problem.name}: {direction}, {peer.name}")
                try:
                    function, results, options = ready(given, peer)
                    parts = parts_of(problem, pairs, results)
                    del results
                    peak = peak_bytes(function, device)
                    row = Row(*where, options=options, peak_gib=None if peak is None else peak / 2**30)
                    row = _compared(row, problem, parts, reference) if peer.same else row
                    functions[len(rows)] = function
                    reference = parts if peer.name == EFFATTN else reference
                except Exception as error:  # one that fails must not take the others with it
                    row = Row(*where, error=_first_line(error))
                rows.append(row)
            done()
        for place, timing in zip(functions, timed(list(functions.values()), device, seconds), strict=True):
            rows[place] = _with_time(rows[place], timing, problem, pairs, peers[place])
        functions.clear()
    return rows


def ready(given: Given, peer: Peer) -> tuple[Callable[[], Parts], Parts, str | None]:
    """What is timed, its first result, and the options of its kernels where it does not run by its own choice."""
    failed: Exception | None = None
    for options in ({}, *peer.fallbacks):
        try:
            function = built(replace(given, options=options), peer)
            return function, function(), ", ".join(f"{name} {value}" for name, value in options.items()) or None
        except Exception as error:  # its own choice says best what is wrong
            failed = failed or error
    assert failed is not None
    raise failed


def built(given: Given, peer: Peer) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: the forward (its result), or the backward of a forward that has run (the gradients)."""
    inputs = given.problem.tensors(grad=given.backward)
    run = peer.make(given)
    if not given.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run(*inputs),)

        return forward
    with torch._functorch.config.patch(donated_buffer=False):  # the backward runs more than once
        out = run(*inputs)
        needed = (*inputs, *given.learned)
        upstream = torch.randn(out.shape, generator=_generator(out), device=out.device).to(out.dtype)
        return lambda: torch.autograd.grad(out, needed, upstream, retain_graph=True)


def parts_of(problem: Problem, pairs: Pairs, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Enough of the output, or of each gradient, to compare. Queries without keys give 0, whatever the peer does."""
    first, *others = (result.detach() for result in results)
    first = first[:, :, pairs.rows].float().masked_fill(~pairs.seeing[..., None].to(first.device), 0.0)
    rows = (other[:, :, pairs.rows].float() if other.ndim == 4 else other.float() for other in others)
    return (first, *rows)


def _compared(row: Row, problem: Problem, parts: Parts, reference: Parts | None) -> Row:
    """With how far the result is from effattn's."""
    if reference is None:
        return row
    apart = [_apart(one, other) for one, other in zip(parts, reference, strict=True)]
    worst = next((share for share in apart if share != share), max(apart))  # NaN first
    return replace(row, difference=worst, tolerated=TOLERANCE[problem.dtype])


def _with_time(row: Row, timing: Timing | Exception, problem: Problem, pairs: Pairs, peer: Peer) -> Row:
    if isinstance(timing, Exception):
        return Row(row.problem, row.tokens, row.direction, row.peer, error=_first_line(timing))
    tflops = flops(problem, pairs.density, row.direction == BACKWARD) / timing.median / 1e9 if peer.same else None
    return replace(row, ms=timing.median, fastest=timing.fastest, runs=timing.runs, tflops=tflops)


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((one - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()


def _with_ratios(rows: Sequence[Row]) -> Iterator[Row]:
    ours = {(row.problem, row.direction): row.ms for row in rows if row.peer == EFFATTN}
    for row in rows:
        base = ours.get((row.problem, row.direction))
        ratio = row.ms / base if row.ms is not None and base else None
        yield replace(row, over_effattn=ratio)


def about(problems: Sequence[Problem], work: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Device, versions, date, and the problems."""
    first = problems[0]
    versions = {"python": platform.python_version(), "torch": torch.__version__, "effattn": effattn.__version__}
    with suppress(metadata.PackageNotFoundError):
        versions["triton"] = metadata.version("triton")
    shared = ("batch", "heads", "kv_heads", "head_dim", "dtype", "mask", "score")
    return {
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
        "device": name_of(first.device),
        "versions": versions,
        "setting": {name: getattr(first, name) for name in shared},
        "work": work,
    }


@contextmanager
def freed() -> Iterator[None]:
    """Free compiled code and memory on exit, also that of a failure."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        gc.collect()
        for device in in_use():
            device.empty_cache()


def _generator(like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(2)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]

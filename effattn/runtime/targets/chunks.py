"""The keys that each chunk of queries visits, and which of them need no mask.

Keys that no query of a chunk sees by conditions that no bound says (documents, padding) are left out in whole blocks.
Runs on the host, from a :class:`~effattn.lowering.iteration.tile_ranges.TileRanges`. A chunk of queries gets sorted
runs of keys. A run is *full* if every query of every batch and head structurally keeps all its keys. Captured tensors
that bounds depend on are read only if they are in host memory; otherwise the bound is unknown, so nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir import expr
from effattn.lowering.device import HOST, on_host
from effattn.lowering.iteration.tile_ranges import TileRanges, tile_ranges
from effattn.runtime.algebra import evaluate, evaluate_integer
from effattn.runtime.selection.block_map import block_grid

Interval = tuple[int, int]

BLOCK = 64  # queries and keys of a block that may be left out


@dataclass(frozen=True)
class Run:
    """Keys ``start <= k < stop``. ``full``: the structural condition holds for all of them and every query."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class Chunk:
    """Queries ``start <= q < stop`` and the keys that any of them may keep, ascending and disjoint."""

    start: int
    stop: int
    runs: tuple[Run, ...]

    @property
    def keys(self) -> int:
        return sum(run.stop - run.start for run in self.runs)

    def slices(self) -> list[Interval]:
        """The keys as the fewest contiguous intervals."""
        return union([(run.start, run.stop) for run in self.runs])


@lru_cache(maxsize=4096)
def names_of_loads(term: Any) -> tuple[str, ...]:
    return tuple(load.name for load in expr.loads_of(term))


@lru_cache(maxsize=4096)
def depends_on_head(term: Any) -> bool:
    return sympy.sympify(term).has(expr.b, expr.h)


@lru_cache(maxsize=4096)
def tile_ranges_of(rule: Any) -> TileRanges:
    return tile_ranges(rule)


class Walker:
    """The chunks of one call."""

    def __init__(
        self,
        rule: Any,
        shape: tuple[int | range, int | range, int, int],
        symbols: Mapping[str, Any],
        captures: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
    ):
        """``shape`` is (B, Hq, Nq, Nk), B and Hq also as the range of some batches and heads; ``symbols`` has the
        scalars, ``captures`` the captured tensors of the rule, whose floats are computed in ``dtype``."""
        batch, heads, self.q_len, self.k_len = shape
        batches, heads = (range(size) if isinstance(size, int) else size for size in (batch, heads))
        self.tile_ranges, self.rule = tile_ranges_of(rule), rule
        self.captures, self.dtype, self.scalars = captures, dtype, symbols
        self.sizes = (len(batches), len(heads), self.q_len, self.k_len)
        self.symbols = {
            **symbols,
            "Nq": self.q_len,
            "Nk": self.k_len,
            "b": torch.arange(batches.start, batches.stop).view(-1, 1),
            "h": torch.arange(heads.start, heads.stop).view(1, -1),
        }

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """All queries in chunks of at most ``rows``, cut at block boundaries if the rule counts in blocks."""
        start = 0
        while start < self.q_len:
            stop = min(start + rows, self.q_len)
            if self.tile_ranges.powers is not None:
                position = self._at(self.tile_ranges.powers.position, start)
                if position is not None:
                    step = max(rows // self.tile_ranges.powers.block, 1) * self.tile_ranges.powers.block
                    stop = min(start + step - position[0] % step, stop)
            yield Chunk(start, stop, self.runs(start, stop))
            start = stop

    def runs(self, start: int, stop: int) -> tuple[Run, ...]:
        """The keys that queries ``start <= q < stop`` visit."""
        runs = self.bounded(start, stop)
        if self._seen is None:
            return runs
        seen = self._seen[start // BLOCK : (stop - 1) // BLOCK + 1].any(dim=0).tolist()
        blocks = union([(place * BLOCK, (place + 1) * BLOCK) for place, some in enumerate(seen) if some])
        parts = [(*clip((run.start, run.stop), block), run.full) for run in runs for block in blocks]
        return tuple(Run(*part) for part in parts if part[0] < part[1])

    def bounded(self, start: int, stop: int) -> tuple[Run, ...]:
        """The same by bounds alone."""
        ranges, first, last = self.tile_ranges, start, stop - 1
        needed, full = self._band(ranges.lower, ranges.upper, first, last)
        if not ranges.choice:
            visited, sure = [needed], [full]
        else:
            visited, sure = [], []
            for wide, narrow in self._choices(first, last):
                visited += [clip(part, needed) for part in wide]
                sure += [clip(part, full) for part in narrow]
        whole = union(sure)
        rest = subtract(union(visited), whole)
        runs = [Run(*part, True) for part in whole] + [Run(*part, False) for part in rest]
        return tuple(sorted(runs, key=lambda run: run.start))

    @cached_property
    def _seen(self) -> Tensor | None:
        """Blocks of queries and keys in which some query may see a key, bool [M, N]; None: bounds say it, or data are
        not in host memory, or there are too few queries."""
        loaded = [self.captures[name] for name in names_of_loads(self.rule)]
        if self.tile_ranges.residual == sympy.true or self.q_len < BLOCK or not all(map(on_host, loaded)):
            return None
        some, _ = block_grid(self.rule, self.sizes, self.scalars, self.captures, BLOCK, BLOCK, HOST, self.dtype)
        return some.flatten(0, 1).any(dim=0)

    def _choices(self, first: int, last: int) -> Iterator[tuple[list[Interval], list[Interval]]]:
        """For each alternative of the choice: intervals that some query may keep, and that all queries keep."""
        ranges = self.tile_ranges
        if ranges.near_lower is not None:
            needed, full = self._band(ranges.near_lower, ranges.near_upper, first, last)
            yield [needed], [full]
        if ranges.prefix is not None:
            needed, full = self._band((), (ranges.prefix,), first, last)
            yield [needed], [full]
        if ranges.powers is not None:
            block = ranges.powers.block
            low, high = self._at(ranges.powers.position, first), self._at(ranges.powers.position, last)
            if low is None or high is None:
                yield [(0, self.k_len)], []
                return
            # a few query blocks: the key blocks at power-of-two distances from any of them
            nearest, furthest = low[0] // block, high[1] // block
            blocks = set()
            distance = 1
            while distance <= furthest:
                blocks |= set(range(max(nearest - distance, 0), furthest - distance + 1))
                distance *= 2
            parts = union([(i * block, min((i + 1) * block, self.k_len)) for i in blocks])
            yield parts, parts if nearest == furthest else []

    def _band(self, lower: tuple, upper: tuple, first: int, last: int) -> tuple[Interval, Interval]:
        """(keys that some query keeps, keys that every query keeps) of ``lower(q) <= k < upper(q)``."""
        needed = [0, self.k_len]
        full = [0, self.k_len]
        for bound in lower:
            least, most = self._at(bound, first), self._at(bound, last)
            needed[0] = max(needed[0], least[0]) if least else needed[0]
            full[0] = max(full[0], most[1]) if most else self.k_len
        for bound in upper:
            least, most = self._at(bound, first), self._at(bound, last)
            needed[1] = min(needed[1], most[1]) if most else needed[1]
            full[1] = min(full[1], least[0]) if least else 0
        return (needed[0], needed[1]), (full[0], full[1])

    def _at(self, bound: Any, row: int) -> Interval | None:
        """(min, max) of a bound at a query, over all batches and heads; None if it is only known on the device."""
        names = names_of_loads(bound)
        if not names and not depends_on_head(bound):
            value = evaluate_integer(bound, {**self.symbols, "q": row})
            return value, value
        if not all(on_host(self.captures[name]) for name in names):
            return None
        value = evaluate(bound, {**self.symbols, "q": row}, self.captures, torch.float64, HOST)
        if isinstance(value, Tensor):
            return int(value.min()), int(value.max())
        return int(value), int(value)


def clip(part: Interval, to: Interval) -> Interval:
    return max(part[0], to[0]), min(part[1], to[1])


def union(parts: list[Interval]) -> list[Interval]:
    """Sorted, disjoint, non-adjacent and non-empty intervals."""
    merged: list[Interval] = []
    for start, stop in sorted(part for part in parts if part[0] < part[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def subtract(parts: list[Interval], holes: list[Interval]) -> list[Interval]:
    """The parts of ``parts`` outside ``holes``; both as returned by :func:`union`."""
    left = []
    for start, stop in parts:
        for low, high in holes:
            if high <= start or low >= stop:
                continue
            if start < low:
                left.append((start, low))
            start = max(start, high)
        if start < stop:
            left.append((start, stop))
    return left

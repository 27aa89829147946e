"""How queries are cut into chunks, and which keys each chunk visits: by formula, or by blocks where data tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from effattn.runtime.targets.chunks import Chunk, Run, Walker

BLOCK = 64  # queries and keys of a block
NONE, SOME, ALL = 0, 1, 2  # of the queries of a block see keys of a block


class Tiling(Protocol):
    def chunks(self, rows: int) -> Iterator[Chunk]:
        """All queries in chunks of at most ``rows``."""
        ...

    def visited(self, rows: int) -> float:
        """Keys that a chunk visits: of a typical one."""
        ...

    def tested(self, rows: int) -> int:
        """Keys of a chunk that need a mask: the most of any."""
        ...


@dataclass(frozen=True)
class ByFormula:
    """From bounds; the first or the last queries have the most keys that need a mask."""

    walker: Walker
    q_len: int

    def chunks(self, rows: int) -> Iterator[Chunk]:
        return self.walker.chunks(rows)

    def visited(self, rows: int) -> float:
        return sum(run.stop - run.start for run in self._runs(self.q_len // 2, rows))

    def tested(self, rows: int) -> int:
        ends = (self._runs(first, rows) for first in (0, self.q_len - rows))
        return max(sum(run.stop - run.start for run in runs if not run.full) for runs in ends)

    def _runs(self, first: int, rows: int) -> Sequence[Run]:
        first = max(min(first, self.q_len - rows), 0)
        return self.walker.runs(first, min(first + rows, self.q_len))


@dataclass(frozen=True)
class ByBlocks:
    """From a table int8 [Mq, Mk] with NONE, SOME or ALL for each block of queries and block of keys."""

    table: Tensor
    q_len: int
    k_len: int
    by_height: dict[int, Tensor] = field(default_factory=dict)  # the table for chunks of so many blocks

    def chunks(self, rows: int) -> Iterator[Chunk]:
        kinds = self._kinds(rows)
        for start in range(0, self.q_len, rows):
            runs = (
                Run(first * BLOCK, min(last * BLOCK, self.k_len), kind == ALL)
                for first, last, kind in runs_of(kinds[start // max(rows, BLOCK)])
                if kind != NONE
            )
            yield Chunk(start, min(start + rows, self.q_len), tuple(runs))

    def visited(self, rows: int) -> float:
        return (self._kinds(rows) != NONE).sum(dim=1, dtype=torch.float32).mean().item() * BLOCK

    def tested(self, rows: int) -> int:
        return int((self._kinds(rows) == SOME).sum(dim=1).max()) * BLOCK

    def _kinds(self, rows: int) -> Tensor:
        """The table for chunks of ``rows`` queries; one with fewer than a block is as its block."""
        height = max(rows // BLOCK, 1)
        if height not in self.by_height:
            missing = -self.table.shape[0] % height
            table = torch.cat([self.table, self.table[-1:].expand(missing, -1)]).unflatten(0, (-1, height))
            low, high = table.amin(dim=1), table.amax(dim=1)
            self.by_height[height] = torch.where(low == high, low, SOME)
        return self.by_height[height]


def runs_of(kinds: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, stop, value) of each run of equal values."""
    values, counts = torch.unique_consecutive(kinds, return_counts=True)
    start = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield start, start + count, value
        start += count

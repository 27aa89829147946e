"""The parts of a call that see the same keys, batches and heads, each in strips with the keys that need a test.

Captured tensors are in host memory, so what they hide is read here: blocks of keys that no query of a chunk sees are
not visited, and those that all of them see are not tested.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir import expr
from effattn.lowering.device import HOST
from effattn.runtime.algebra import Span, evaluate
from effattn.runtime.selection.block_map import block_grid
from effattn.runtime.targets.chunks import Chunk, Run, Walker
from effattn.runtime.targets.portable import tilings
from effattn.runtime.targets.portable.call import Call
from effattn.runtime.targets.portable.strips import Strip, alone, causal, joined, strips
from effattn.runtime.targets.portable.tilings import ALL, NONE, SOME, ByBlocks, ByFormula, Tiling, runs_of

ROWS_AT_ONCE = 2**14  # rows of a strip: enough for many cores
HEIGHTS = (256, 128, 64, 32, 16, 8, 4, 2, 1)  # queries per chunk that are tried
# the kernel takes 256, 64 or 32 rows at a time: (rows of a chunk, time for each key relative to the best)
SPEEDS = ((768, 1.0), (192, 1.03), (0, 1.13))
MOST_RUNS = 8  # of keys in a chunk; more are not worth being told apart
PER_CHUNK = 2**14  # what a chunk costs beside its pairs of queries and keys, in pairs


@dataclass(frozen=True)
class Planned:
    """A strip, and the rule on the keys that are tested: bool [Hkv or 1, C or 1, G or 1, rows, n].

    ``kept`` is None if no key is tested, or if the chunks of the strip differ: then it is evaluated when it is needed.
    """

    strip: Strip
    kept: Tensor | None


@dataclass(frozen=True)
class Share:
    """Batches and kv heads of a call that visit the same keys. Shares without captured tensors are planned once."""

    rule: Any
    batches: range
    kv_heads: range
    groups: int
    q_len: int
    k_len: int
    head_dim: int
    names: tuple[tuple[str, Any], ...]  # scalars and numbers with their values
    dtype: torch.dtype  # in which floats are computed
    budget: int  # most elements of a mask
    scale_is_positive: bool  # else the kernel, which masks before it scales, must not mask causally
    captures: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    blocks: Tensor | None = field(default=None, compare=False)  # see ByBlocks; None: the rule is a formula

    def planned(self) -> Sequence[Planned] | Iterator[Planned]:
        """Its queries in order."""
        return _plan_once(self) if not self.captures and self.blocks is None else self.plan()

    def plan(self) -> Iterator[Planned]:
        tiling, last = self._tiling(), None
        chunks: Iterable[Chunk] = tiling.chunks(self._height(tiling))
        if self.blocks is not None:
            chunks = itertools.chain.from_iterable(map(self._refined, chunks))
        for strip in strips(causal(chunks, self._is_diagonal) if self.scale_is_positive else chunks, self._most):
            kept = self.kept(strip) if strip.tested else None
            if kept is not None and last is not None and torch.equal(kept, last):
                kept = last  # most strips have the same: it is held once
            last = kept
            yield Planned(strip, kept if kept is None or kept.shape[1] == 1 else None)

    def kept(self, strip: Strip) -> Tensor:
        """The rule on the tested keys of a strip, as in :class:`Planned`. All chunks share one mask if they agree."""
        heads, chunks = self._heads(), strip.chunks
        # indices that broadcast against [Hkv, C, G, rows, n]
        symbols: dict[str, Any] = {
            **dict(self.names),
            "Nq": self.q_len,
            "Nk": self.k_len,
            "b": self.batches.start,
            "h": Span.of([(heads.start, heads.stop)], HOST, -1, 1, self.groups, 1, 1),
            "q": Span.of([(strip.start, strip.stop)], HOST, chunks, 1, strip.rows, 1),
            "k": Span.of([keys.of(0) for keys in strip.tested], HOST) if chunks == 1 else _of_chunks(strip),
        }
        kept = torch.as_tensor(evaluate(self.rule, symbols, self.captures, self.dtype, HOST)).to(torch.bool)
        leading = ((1,) * (5 - kept.ndim) + kept.shape)[:3]
        kept = kept.expand(*leading, strip.rows, strip.width_tested)
        return kept[:, :1] if kept.shape[1] > 1 and bool((kept == kept[:, :1]).all()) else kept

    def _refined(self, chunk: Chunk) -> Iterator[Chunk]:
        """The chunk with runs of single keys in the place of blocks, cut where queries share no keys with those before
        (a document ends), if these are few."""
        strip = alone(chunk)
        if not strip.tested:
            yield chunk
            return
        kept = self.kept(strip).flatten(0, 2)
        cuts = [0, *([] if any(run.full for run in chunk.runs) else _cuts(kept)), strip.rows]
        found = []
        for first, last in itertools.pairwise(cuts):
            rows = kept[:, first:last].flatten(0, 1)
            kinds = torch.where(rows.all(dim=0), ALL, torch.where(rows.any(dim=0), SOME, NONE))
            runs = [run for run in chunk.runs if run.full]
            for keys, part in zip(strip.tested, kinds.split([keys.width for keys in strip.tested]), strict=True):
                seen = [run for run in runs_of(part) if run[2] != NONE]
                runs += [Run(keys.first + start, keys.first + stop, kind == ALL) for start, stop, kind in seen]
            found.append(Chunk(chunk.start + first, chunk.start + last, joined(runs)))
        few = all(len(one.runs) <= max(len(chunk.runs), MOST_RUNS) for one in found)
        yield from found if few else [chunk]

    def _is_diagonal(self, strip: Strip) -> bool:
        return bool((self.kept(strip) == torch.ones(strip.rows, strip.rows, dtype=torch.bool).tril()).all())

    def _heads(self) -> range:
        return range(self.kv_heads.start * self.groups, self.kv_heads.stop * self.groups)

    def _tiling(self) -> Tiling:
        if self.blocks is not None:
            return ByBlocks(self.blocks, self.q_len, self.k_len)
        sizes = (self.batches, self._heads(), self.q_len, self.k_len)
        return ByFormula(Walker(self.rule, sizes, dict(self.names), self.captures), self.q_len)

    def _height(self, tiling: Tiling) -> int:
        """Queries per chunk: few of them visit fewer keys in vain, many are computed faster."""

        def cost(rows: int) -> float:
            speed = next(time for least, time in SPEEDS if rows * self.groups >= least)
            return (tiling.visited(rows) + PER_CHUNK / rows) * speed

        fitting = [rows for rows in HEIGHTS if rows * self.groups * tiling.tested(rows) <= self.budget]
        return min(fitting, key=cost, default=1)

    def _most(self, chunk: Chunk) -> int:
        """Of how many chunks like this one a strip may consist."""
        rows, heads = self.groups * (chunk.stop - chunk.start), len(self.kv_heads)
        elements = max(chunk.keys, 1) * max(rows, heads * self.head_dim)  # of a mask, or of copied keys
        return max(min(ROWS_AT_ONCE // (heads * rows), self.budget // elements), 1)


@lru_cache(maxsize=32)
def _plan_once(share: Share) -> tuple[Planned, ...]:
    return tuple(share.plan())


def shares(call: Call) -> Iterator[Share]:
    """The whole call, in as few shares as its rule allows."""
    rule = call.plan.spec.rule
    captures = {load.name: call.captures[load.name] for load in expr.loads_of(rule)}
    dependent = _dependencies(rule, tuple((name, tuple(tensor.shape)) for name, tensor in captures.items()))
    grid = None
    if call.tile_ranges.residual != sympy.true:
        sizes, block = (call.batch, call.heads, call.q_len, call.k_len), tilings.BLOCK
        some, every = block_grid(rule, sizes, call.names, captures, block, block, HOST, call.dtype)
        grid = torch.where(every, ALL, torch.where(some, SOME, NONE)).to(torch.int8)
    for batches in _each(range(call.batch), expr.b in dependent):
        for kv_heads in _each(range(call.kv_heads), expr.h in dependent):
            yield Share(
                rule,
                batches,
                kv_heads,
                call.groups,
                call.q_len,
                call.k_len,
                call.head_dim,
                tuple(call.names.items()),
                call.dtype,
                call.budget,
                call.scale is not None and call.scale > 0,
                captures,
                None if grid is None else _blocks_of(grid, batches, kv_heads, call.groups),
            )


def _cuts(kept: Tensor) -> list[int]:
    """Rows of ``kept`` [..., rows, n] that share no key with the row before, if they are few; not among empty rows."""
    shared = (kept[:, :-1] & kept[:, 1:]).any(dim=2).any(dim=0)
    empty = ~kept.any(dim=2).any(dim=0)
    cuts = (~shared & ~(empty[:-1] & empty[1:])).nonzero()[:, 0] + 1
    return cuts.tolist() if len(cuts) <= MOST_RUNS else []


def _each(whole: range, apart: bool) -> list[range]:
    return [range(i, i + 1) for i in whole] if apart else [whole]


def _blocks_of(grid: Tensor, batches: range, kv_heads: range, groups: int) -> Tensor:
    """The part of a grid [B or 1, Hq or 1, Mq, Mk] that all batches and heads of a share agree with: [Mq, Mk]."""
    part = grid[batches.start : batches.stop] if grid.shape[0] > 1 else grid
    part = part[:, kv_heads.start * groups : kv_heads.stop * groups] if grid.shape[1] > 1 else part
    low, high = part.amin(dim=(0, 1)), part.amax(dim=(0, 1))
    return torch.where(low == high, low, SOME)


@lru_cache(maxsize=1024)
def _dependencies(rule: Any, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> frozenset[sympy.Symbol]:
    """Symbols that a rule depends on. An index of a dimension of size 1 counts for nothing."""
    sizes = dict(shapes)
    read = {
        load: load.func(load.args[0], *(i if n > 1 else 0 for i, n in zip(load.indices, sizes[load.name], strict=True)))
        for load in expr.loads_of(rule)
    }
    return frozenset(expr.free_symbols(sympy.sympify(rule).xreplace(read)))


def _of_chunks(strip: Strip) -> Tensor:
    """The tested keys of each chunk: int64 [C, 1, 1, n]."""
    offsets = torch.arange(strip.chunks)[:, None]
    return torch.cat([torch.arange(*keys.of(0)) + keys.step * offsets for keys in strip.tested], dim=1)[:, None, None]

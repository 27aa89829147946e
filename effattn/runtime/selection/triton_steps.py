"""Score and pick by generated kernels, with the same results as :mod:`scores` and :mod:`pick`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.ir.selector import Last, Pick, Reduce, Score, Strided, TopP
from effattn.lowering.kernels.selection import pick as pick_source
from effattn.lowering.kernels.selection import score as score_source
from effattn.lowering.kernels.selection.score import ScoreSpec
from effattn.runtime import kernels
from effattn.runtime.launching import Known, LaunchCache, far, tensor_key, tf32, width
from effattn.runtime.selection import portable_steps as portable
from effattn.runtime.selection.places import Places
from effattn.runtime.selection.vectors import vectors

MAX_SPLITS = 32
PROGRAMS = 512  # enough to fill any GPU a few times


class Scorer(portable.Scorer):
    """A scorer whose softmax scores come from kernels. Products of means are one matrix product, as in ATen."""

    def __init__(self, plan: Plan, score: Score, reduce: Reduce, query, key, captures, scalars, numbers):
        super().__init__(plan, score, reduce, query, key, captures, scalars, numbers)
        self.given = (list(captures), list(scalars), [float(number) for number in numbers])

    def chunks(self, blocks: int) -> list[tuple[int, int]]:
        return [(0, blocks)] if self.score.softmax else super().chunks(blocks)

    def of(self, first: int, last: int) -> Tensor:
        if not self.score.softmax:
            return super().of(first, last)
        assert (first, last) == (0, self.blocks)
        query, key = vectors(self.query, self.score.query, self.pooled), self.key
        batch, lists, rows, head_dim = query.shape
        tail = isinstance(self.score.query, Last)
        q_stride = self.score.query.stride if isinstance(self.score.query, Strided) else 1
        k_stride = self.score.key.stride if isinstance(self.score.key, Strided) else 1
        height = self.expand.block // q_stride
        row_tiles = -(-rows // score_source.TILE_SIDE[16]) * batch * lists
        spec = ScoreSpec(
            self.plan.form,
            self.plan.spec,
            str(query.dtype).removeprefix("torch."),
            head_dim,
            lists // key.shape[1],
            q_stride,
            k_stride,
            height,
            self.expand.unit // k_stride,
            self.reduce.rows,
            self.reduce.columns,
            splits_for(row_tiles, key.shape[2]),
            tf32=tf32() and query.dtype == torch.float32,
            wide=far(batch, self.q_len, self.k_len, *self.given[1]),
        )
        units = -(-self.k_len // self.expand.unit)
        nothing = -torch.inf if self.reduce.columns == "max" else 0.0
        out = query.new_full((batch, lists, self.blocks, units), nothing, dtype=torch.float32)
        row_start = self.q_len - rows if tail else 0
        divisor = float(rows if tail else height)
        captures, scalars, _ = self.given

        def started(call: _Call) -> tuple[Tensor, Known]:
            sizes = (row_start, divisor, self.q_len, self.k_len)
            return out, call.launch(query, key, out, *sizes, *self.given, call.known)

        launch_key = (spec, *map(tensor_key, (query, key, *captures)), *map(width, scalars))
        return _CALLS.run(launch_key, lambda: _Call(_score_module(spec).launch), started)


def splits_for(row_tiles: int, key_vectors: int) -> int:
    """Number of parts of the keys, from sizes alone, so that enough programs run at once."""
    splits = 1
    while splits < MAX_SPLITS and row_tiles * splits < PROGRAMS and splits * 512 < key_vectors:
        splits *= 2
    return splits


@dataclass(frozen=True)
class _Call:
    launch: Callable[..., Known]
    known: Known | None = None


_CALLS = LaunchCache()


@lru_cache(maxsize=256)
def _score_module(spec: ScoreSpec) -> Any:
    source = score_source.generate(spec)
    return kernels.capture_source(f"{spec.form}_score_{spec.dtype}_d{spec.head_dim}", source)


@lru_cache(maxsize=64)
def _pick_module(width: int) -> Any:
    return kernels.capture_source(f"pick_{width}", pick_source.generate(width, pick_source.warps_for(width)))


def choose_into(
    order: Tensor, rows: slice, scores: Tensor, count: Tensor, pick: Pick, unit: int, places: Places
) -> None:
    """Fill ``order[:, :, rows]`` like :func:`effattn.runtime.selection.pick.choose_into`, each part in key order."""
    batch, lists, blocks, units = scores.shape
    if units > pick_source.WIDEST:
        portable.choose_into(order, rows, scores, count, pick, unit, places)
        return
    width = pick_source.width_for(units)
    module = _pick_module(width)
    firsts, lasts = places.first.to(torch.int32), places.last.to(torch.int32)
    counted = count.shape[1]
    sizes = (lists, counted, places.blocks, rows.start, blocks, units, order.shape[3], *pick.forced_units(unit))
    sharing = 1 << (counted // lists - 1).bit_length()
    grid = (batch * counted * blocks,)
    module.choose[grid](scores.contiguous(), count, order, firsts, lasts, *sizes, width, sharing, **module.OPTIONS)


def top_p_counts(top_p: TopP, mass: Tensor, pick: Pick, unit: int, places: Places) -> Tensor:
    """Number of units each head visits per query block: int32 [B, Hq, M], from its mass [B, Hq, 1, U]."""
    batch, heads, _, units = mass.shape
    if units > pick_source.WIDEST:
        return portable.top_p_counts(top_p, mass, pick, unit, places)
    width = pick_source.width_for(units)
    module = _pick_module(width)
    found = torch.empty((batch, heads, places.blocks), dtype=torch.int32, device=mass.device)
    firsts, lasts = places.first.to(torch.int32), places.last.to(torch.int32)
    sinks, local = pick.forced_units(unit)
    least = -(-top_p.least // unit)
    module.cover[(batch * heads,)](
        mass, found, firsts, lasts, places.blocks, units, top_p.gamma, least, sinks, local, width, **module.OPTIONS
    )
    return found

"""Runs a selector on the tensors of a call. Nothing synchronises with the device, and nothing is N x N."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.ir.selector import Chunks, Mean, TopP, Trained
from effattn.runtime.algebra import bindings
from effattn.runtime.selection import chunks as chunked
from effattn.runtime.selection import portable_steps
from effattn.runtime.selection.block_list import BlockList
from effattn.runtime.selection.pick import budget_units, counts
from effattn.runtime.selection.places import Places, places_of
from effattn.runtime.selection.scores import PRODUCTS
from effattn.runtime.selection.vectors import pool_heads, vectors


@torch.no_grad()
def select(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor] = (),
    scalars: Sequence[int] = (),
    numbers: Sequence[float] = (),
    steps: Any = portable_steps,
) -> BlockList:
    """The units of keys that each query block of a call visits.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D]; captures, scalars, numbers: in the plan's order.
        steps: the module that scores and picks: ``portable_steps`` in ATen, ``triton_steps`` with generated kernels.
    """
    assert plan.sparsity.select is not None
    given = (captures, scalars, numbers)
    places = places_of(plan, query.shape[2], key.shape[2], *given, query.device)
    expand = plan.sparsity.select.expand
    if expand.unit == 1:
        order, count = _tokens(plan, query, key, given, places)
    else:
        order, count = _units(plan, query, key, given, places, steps)
    return BlockList(order, count.contiguous(), places.own.to(torch.int32)[None, None], expand.block, expand.unit)


def _units(plan: Plan, query: Tensor, key: Tensor, given: tuple, places: Places, steps: Any) -> tuple[Tensor, Tensor]:
    selector = plan.sparsity.select
    assert selector is not None
    pick, unit = selector.pick, selector.expand.unit
    scorer = steps.Scorer(plan, selector.score, selector.reduce, query, key, *given)
    of_last: Tensor | None = None
    if isinstance(pick.budget, TopP):
        mass = steps.Scorer(plan, pick.budget.score, pick.budget.reduce, query, key, *given).of(0, 1)
        count = steps.top_p_counts(pick.budget, mass, pick, unit, places)
        width = places.units  # heads take different numbers of units from one list
        if pick.budget.ranks_last:
            of_last = mass.squeeze(2).unflatten(1, (scorer.lists, -1)).amax(2)
    else:
        budget = budget_units(pick, unit, key.shape[2])
        count = counts(budget, pick, unit, places).expand(query.shape[0], scorer.lists, -1).contiguous()
        forced = places.most_own(selector.expand.block, unit) + sum(pick.forced_units(unit))
        width = min(places.units, max(budget, forced))
    shape = (query.shape[0], scorer.lists, places.blocks, width)
    order = torch.empty(shape, dtype=torch.int32, device=query.device)
    for first, last in scorer.chunks(places.blocks):
        scores = scorer.of(first, last)
        if of_last is not None and last == places.blocks:
            scores[:, :, -1] = of_last
        steps.choose_into(order, slice(first, last), scores, count, pick, unit, places)
    return order, count


def _tokens(plan: Plan, query: Tensor, key: Tensor, given: tuple, places: Places) -> tuple[Tensor, Tensor]:
    """Score chunks of keys, and take tokens."""
    selector = plan.sparsity.select
    assert selector is not None
    score = selector.score
    assert isinstance(score.key, (Chunks, Trained, Mean))
    _, tensors = bindings(plan.spec, *given)
    pooled: Any = pool_heads(key, 1)
    found = chunked.cut(score.key, key, pooled, tensors)
    means = chunked.chunk_means(score.key, pooled, found)
    queries = vectors(query, score.query, 1).float()
    step = max(PRODUCTS // max(means.shape[2] * query.shape[0], 1), 1)
    orders, totals = [], []
    for first in range(0, places.blocks, step):
        rows = slice(first, first + step)
        scores = queries[:, :, rows] @ means.transpose(-1, -2)
        order, count = chunked.tokens_of(scores, found, selector.pick, places.of(rows))
        orders.append(order)
        totals.append(count)
    return torch.cat(orders, dim=2), torch.cat(totals, dim=2)

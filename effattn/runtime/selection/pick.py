"""Pick in ATen: from scores to the order of units, and the number of units each head visits."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.ir.selector import Pick, Tokens, TopFraction, TopP
from effattn.runtime.selection.places import Places

FORCED = 3.0e38  # greater than any score; a block's own units have infinity


def forced_units(pick: Pick, unit: int, places: Places) -> tuple[Tensor, Tensor]:
    """(a block's own units; its sinks and most recent units), eligible ones only: bool [M, U] each."""
    units = torch.arange(places.units, device=places.first.device)
    last = places.last[:, None]
    eligible = units <= last
    own = eligible & (units >= places.first[:, None])
    sinks, local = pick.forced_units(unit)
    near = eligible & ((units < sinks) | (units > last - local))
    return own, near & ~own


def ranked(scores: Tensor, own: Tensor, near: Tensor, last: Tensor) -> Tensor:
    """Units in order of importance: int32 [B, L, M, U]. Ties go to the later unit.

    The block's own units come first, then forced units, then the others by score; ineligible units come last.
    """
    units = torch.arange(scores.shape[-1], device=scores.device)
    keyed = scores.nan_to_num(nan=-torch.inf, posinf=FORCED, neginf=-FORCED).clamp(-FORCED / 2, FORCED / 2)
    keyed = keyed.masked_fill(near, FORCED).masked_fill(own, torch.inf)
    keyed = keyed.masked_fill(units > last[:, None], -torch.inf)
    # sorting the reversed units stably puts the later of two equal ones first
    order = keyed.flip(-1).argsort(dim=-1, descending=True, stable=True)
    return (scores.shape[-1] - 1 - order).to(torch.int32)


def budget_units(pick: Pick, unit: int, k_len: int) -> int:
    """Units that a query block may visit, including forced ones, for a budget that does not depend on data."""
    budget = pick.budget
    if isinstance(budget, Tokens):
        return -(-budget.tokens // unit)
    assert isinstance(budget, TopFraction)
    units = -(-k_len // unit)
    return max(int(budget.share * units), -(-budget.least // unit), 1)


def top_p_units(top_p: TopP, unit: int, mass: Tensor) -> Tensor:
    """Number of units that hold ``gamma`` of each head's mass: int64 [B, H, 1] from [B, H, 1, U]."""
    best = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    needed = (best < top_p.gamma * best[..., -1:]).sum(dim=-1) + 1
    return needed.clamp(min=-(-top_p.least // unit), max=mass.shape[-1])


def counts(budget: Tensor | int, pick: Pick, unit: int, places: Places) -> Tensor:
    """Number of units each block visits: the budget, clamped to [forced, eligible]: int32 [..., M]."""
    sinks, local = pick.forced_units(unit)
    of_sinks = places.first.clamp(max=sinks)
    recent = torch.maximum(places.last + 1 - local, of_sinks)
    least = places.own + of_sinks + (places.first - recent).clamp(min=0)
    wanted = least.clamp(min=budget) if isinstance(budget, int) else torch.maximum(least, budget)
    return torch.minimum(wanted, places.eligible).to(torch.int32)


def choose_into(
    order: Tensor, rows: slice, scores: Tensor, count: Tensor, pick: Pick, unit: int, places: Places
) -> None:
    """Fill ``order[:, :, rows]`` with the units of query blocks ``rows``, best first.

    Args:
        order: int32 [B, L, M, K]; scores: float32 [B, L, rows, U]; count: int32 [B, C, M].
    """
    here = places.of(rows)
    own, near = forced_units(pick, unit, here)
    order[:, :, rows] = ranked(scores, own, near, here.last)[..., : order.shape[3]]


def top_p_counts(top_p: TopP, mass: Tensor, pick: Pick, unit: int, places: Places) -> Tensor:
    """Number of units each head visits per query block: int32 [B, Hq, M], from its mass [B, Hq, 1, U]."""
    return counts(top_p_units(top_p, unit, mass), pick, unit, places)

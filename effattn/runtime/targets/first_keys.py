"""The first key of each text, for forms that keep the first keys of padded text: from the mask, in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effattn.ir.expr import FIRST_KEY
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import key_conditions, tile_ranges
from effattn.runtime.algebra import bindings, evaluate


def lacks_first_keys(plan: Plan, captures: Sequence[Tensor]) -> bool:
    """Whether a plan from :meth:`Plan.at` reads the tensor ``FIRST_KEY``, which callers do not pass."""
    read = plan.spec.captures
    return len(read) > len(captures) and read[-1].name == FIRST_KEY


def with_first_keys(
    plan: Plan, key: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], numbers: Sequence[float]
) -> Sequence[Tensor]:
    """``captures`` with the tensor ``FIRST_KEY``, if they lack it.

    ``key``: [B, Hkv, Nk, D], for its sizes and device.
    """
    if not lacks_first_keys(plan, captures):
        return captures
    names, tensors = bindings(plan.spec.given, captures, scalars, numbers)
    device, batch, k_len = key.device, key.shape[0], key.shape[2]
    symbols: dict[str, Any] = {
        **names,
        "Nk": k_len,
        "b": torch.arange(batch, device=device)[:, None],
        "k": torch.arange(k_len, device=device),
    }
    condition, _ = key_conditions(tile_ranges(plan.spec.predicate).residual)
    allowed = torch.as_tensor(evaluate(condition, symbols, tensors, torch.float32, device), device=device)
    return [*captures, first_keys(allowed.to(torch.bool).expand(batch, k_len))]


def first_keys(allowed: Tensor) -> Tensor:
    """The first key of each row of ``allowed``, bool [B, Nk]: int32 [B], without synchronising.

    Nk if the allowed keys are not consecutive, or there are none: distances would count the gap, so a form that keeps
    ``k < first + sinks`` then keeps every key.
    """
    k_len = allowed.shape[1]
    places = torch.arange(k_len, device=allowed.device)
    first = torch.where(allowed, places, k_len).amin(-1)
    last = torch.where(allowed, places, -1).amax(-1)
    consecutive = (last - first + 1 == allowed.sum(-1)) & (last >= 0)
    return torch.where(consecutive, first, k_len).to(torch.int32)

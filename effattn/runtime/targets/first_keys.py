"""The first key of each text, for forms that count distances in padded or packed text: from the mask, in every call.

A batch has one where only padding hides keys; a query has its own where conditions on data depend on it (documents).
Nothing synchronises with the device, and nothing is N x N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.ir.expr import FIRST_KEY, h, k, q
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import key_conditions, text_conditions
from effattn.runtime.algebra import bindings, evaluate

PAIRS = 2**24  # pairs of query and key that are looked at together
Value = Callable[..., Tensor]  # of a term, by the values of further symbols


def lacks_first_keys(plan: Plan, captures: Sequence[Tensor]) -> bool:
    """Whether a plan from :meth:`Plan.at` reads the tensor ``FIRST_KEY``, which callers do not pass."""
    read = plan.spec.captures
    return len(read) > len(captures) and read[-1].name == FIRST_KEY


def unread_first_keys(plan: Plan, at: Plan, captures: Sequence[Tensor]) -> bool:
    """Whether a call passes ``FIRST_KEY``, as its last captured tensor, that what runs (``at``) reads not."""
    names = [spec.captures[-1].name if spec.captures else "" for spec in (plan.spec, at.spec)]
    passed = names[0] == FIRST_KEY and len(captures) == len(plan.spec.captures)
    return passed and names[1] != FIRST_KEY


def empty_first_keys(plan: Plan, query: Tensor) -> Tensor:
    """An uninitialised tensor in the shape and dtype of ``FIRST_KEY``: int32 [B] or [B, Nq]."""
    return query.new_empty(query.shape[:3:2][: plan.spec.captures[-1].ndim], dtype=torch.int32)


def with_first_keys(
    plan: Plan, query: Tensor, key: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], numbers: Sequence[float]
) -> Sequence[Tensor]:
    """``captures`` with the tensor ``FIRST_KEY``, if they lack it.

    ``query`` [B, Hq, Nq, D] and ``key`` [B, Hkv, Nk, D], for their sizes and device.
    """
    if not lacks_first_keys(plan, captures):
        return captures
    if key.shape[2] == 0:
        return [*captures, empty_first_keys(plan, query).zero_()]
    names, tensors = bindings(plan.spec.given, captures, scalars, numbers)
    device, batch, q_len, k_len = key.device, key.shape[0], query.shape[2], key.shape[2]
    symbols = {**names, "Nq": q_len, "Nk": k_len, "b": torch.arange(batch, device=device)[:, None]}

    def value(term: Any, **indices: Tensor) -> Tensor:
        found = evaluate(term, {**symbols, **indices}, tensors, torch.float32, device)
        return torch.as_tensor(found, device=device)

    data = text_conditions(plan.spec.predicate)
    alone, others = key_conditions(data)
    keys = torch.arange(k_len, device=device)
    allowed = value(alone, k=keys).to(torch.bool).expand(batch, k_len)
    if plan.spec.captures[-1].ndim == 1:
        return [*captures, first_keys(allowed)]
    sides = _two_sides(others)
    if sides is not None:
        rows = torch.arange(q_len, device=device)
        of_query, of_key = value(sides[0], q=rows).to(torch.int64), value(sides[1], k=keys).to(torch.int64)
        return [*captures, first_keys_of_equals(of_query.expand(batch, q_len), of_key.expand(batch, k_len), allowed)]
    symbols["b"] = symbols["b"][..., None]
    found, step = [], max(PAIRS // max(batch * k_len, 1), 1)
    for start in range(0, q_len, step):
        rows = torch.arange(start, min(start + step, q_len), device=device)
        found.append(first_keys(value(data, q=rows[:, None], k=keys).to(torch.bool).expand(batch, len(rows), k_len)))
    return [*captures, torch.cat(found, dim=1) if found else empty_first_keys(plan, query)]


def first_keys(allowed: Tensor) -> Tensor:
    """The first key of each row of ``allowed``, bool [..., Nk]: int32 [...], without synchronising.

    Nk if the allowed keys are not consecutive, or there are none: distances would count the gap, so a form that keeps
    ``k < first + sinks`` then keeps every key.
    """
    k_len = allowed.shape[-1]
    places = torch.arange(k_len, device=allowed.device)
    first = torch.where(allowed, places, k_len).amin(-1)
    last = torch.where(allowed, places, -1).amax(-1)
    return _if_consecutive(first, last, allowed.sum(-1), k_len)


def first_keys_of_equals(of_query: Tensor, of_key: Tensor, allowed: Tensor) -> Tensor:
    """:func:`first_keys` of ``allowed & (of_query == of_key)`` for each query, by sorting: int32 [B, Nq].

    ``of_query`` int64 [B, Nq], ``of_key`` int64 [B, Nk], ``allowed`` bool [B, Nk].
    """
    k_len = of_key.shape[1]
    values, order = of_key.contiguous().sort(dim=1, stable=True)  # keys of one value stay in order
    allowed = allowed.gather(1, order)
    places = torch.arange(k_len, device=order.device)
    # of each place: the next and the previous allowed one, and how many there are before
    following = torch.where(allowed, places, k_len).flip(1).cummin(1).values.flip(1)
    preceding = torch.where(allowed, places, -1).cummax(1).values
    before = torch.nn.functional.pad(allowed.cumsum(1), (1, 0))
    of_query = of_query.contiguous()
    start, stop = torch.searchsorted(values, of_query), torch.searchsorted(values, of_query, right=True)
    count = before.gather(1, stop) - before.gather(1, start)
    first = order.gather(1, following.gather(1, start.clamp(max=k_len - 1)).clamp(max=k_len - 1))
    last = order.gather(1, preceding.gather(1, (stop - 1).clamp(min=0)).clamp(min=0))
    return _if_consecutive(first, torch.where(count > 0, last, -1), count, k_len)


def _if_consecutive(first: Tensor, last: Tensor, count: Tensor, k_len: int) -> Tensor:
    return torch.where((last - first + 1 == count) & (last >= 0), first, k_len).to(torch.int32)


def _two_sides(condition: Any) -> tuple[Any, Any] | None:
    """(x, y) of a condition ``x == y`` with x an integer of query and batch, y one of key and batch; else None."""
    if not isinstance(condition, sympy.Eq) or not all(side.is_integer for side in condition.args):
        return None
    of_query, of_key = sympy.expand(condition.lhs - condition.rhs).as_independent(k, as_Add=True)
    return None if of_key.has(q, h) or of_query.has(h) else (of_query, -of_key)

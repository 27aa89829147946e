"""Counts the (query, key) pairs that a predicate keeps, per query as a union of intervals: O(N log N), no mask."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor

from effattn.errors import FormRefused
from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Layout, called_site
from effattn.lowering.device import HOST
from effattn.lowering.forms import FORMS
from effattn.lowering.iteration.tile_ranges import TileRanges, tile_ranges
from effattn.runtime.algebra import evaluate

ROWS_AT_ONCE = 1 << 16


def density_of(form: str, length: int, params: dict[str, Any] | None = None, min_length: int = 0) -> float:
    """Kept pairs / all pairs of causal self-attention over ``length`` tokens; 1.0 is exact.

    Args:
        params: parameters of the form that differ from the defaults.
        min_length: below this length the form keeps everything, as with a policy's ``min_length``.

    Raises:
        FormRefused: the form has a selector, which depends on data.
    """
    chosen = FORMS[form]
    if chosen.select is not None:
        reason = f"what {form!r} keeps depends on query and key"
        raise FormRefused.because("", Refusal(Why.CHOSEN_BY_DATA, reason, "measure it on a model's own"))
    causal = sympy.Le(expr.k, expr.q)
    if length < min_length:
        return 1.0
    sizes = Layout(1, 1, 1, length, length, 1, 1)
    site = called_site(AttentionSpec(expr.s, causal), expr.q, sizes)
    keep = chosen.keep(chosen.params(**(params or {})), site)
    return density(sympy.And(causal, keep), causal, length, length)


def density(kept: Any, allowed: Any, q_len: int, k_len: int) -> float:
    """Pairs where ``kept`` holds / pairs where ``allowed`` holds."""
    pairs = kept_pairs(allowed, q_len, k_len)
    return kept_pairs(kept, q_len, k_len) / pairs if pairs else 1.0


def kept_pairs(predicate: Any, q_len: int, k_len: int) -> int:
    """Number of pairs (q, k), q < q_len and k < k_len, where ``predicate`` holds.

    Raises:
        FormRefused: the predicate depends on data, or its keys are not a union of intervals.
    """
    keys = tile_ranges(predicate)
    if keys.residual != sympy.true or expr.loads_of(predicate) or expr.free_symbols(predicate) & {expr.b, expr.h}:
        reason = f"cannot count the pairs of a predicate that depends on data, or on the head: {predicate}"
        raise FormRefused.because("", Refusal(Why.DATA_MASK, reason))
    total = 0
    for start in range(0, q_len, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, q_len))
        total += int(_kept_keys(keys, _Rows(rows, q_len, k_len)).sum())
    return total


class _Rows:
    """Some queries, and the values of expressions for each of them."""

    def __init__(self, rows: Tensor, q_len: int, k_len: int):
        self.rows, self.k_len = rows, k_len
        self.symbols = {"q": rows, "Nq": q_len, "Nk": k_len}

    def of(self, term: Any) -> Tensor:
        value = evaluate(term, self.symbols, {}, torch.float64, HOST)
        return torch.as_tensor(value, dtype=torch.int64).expand_as(self.rows)

    def band(self, lower: tuple[Any, ...], upper: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Keys from the largest lower bound up to, not including, the smallest upper bound."""
        start, stop = torch.zeros_like(self.rows), torch.full_like(self.rows, self.k_len)
        for bound in lower:
            start = torch.maximum(start, self.of(bound))
        for bound in upper:
            stop = torch.minimum(stop, self.of(bound))
        return start, stop


def _kept_keys(keys: TileRanges, rows: _Rows) -> Tensor:
    """Number of keys of each query: int64 [rows]."""
    start, stop = rows.band(keys.lower, keys.upper)
    if not keys.choice:
        return (stop - start).clamp(min=0)
    intervals = []
    if keys.near_lower is not None:
        intervals.append(rows.band(keys.near_lower, keys.near_upper))
    if keys.prefix is not None:
        intervals.append((torch.zeros_like(start), rows.of(keys.prefix)))
    if keys.powers is not None:
        size = keys.powers.block
        block = rows.of(keys.powers.position) // size
        for exponent in range(int(block.max()).bit_length()):
            far = block - (1 << exponent)
            intervals.append((far * size, torch.where(far >= 0, far + 1, far) * size))
    starts = torch.stack([torch.maximum(first, start) for first, _ in intervals], dim=1)
    stops = torch.stack([torch.minimum(last, stop) for _, last in intervals], dim=1)
    return _union(starts, torch.maximum(starts, stops))


def _union(starts: Tensor, stops: Tensor) -> Tensor:
    """Length of the union of each row's intervals: starts, stops int64 [rows, intervals] to int64 [rows]."""
    starts, order = starts.sort(dim=1)
    stops = stops.gather(1, order)
    covered = torch.cat([starts[:, :1], stops.cummax(dim=1).values[:, :-1]], dim=1)  # end of the preceding intervals
    return (stops - torch.maximum(starts, covered)).clamp(min=0).sum(dim=1)

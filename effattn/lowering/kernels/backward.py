"""Source of the backward: one kernel loops over key tiles, another over query tiles for each key tile."""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import fold
from effattn.ir.refusal import Refusal, Why
from effattn.lowering.dialects.triton.terms import KEYS, ROWS, TILE, UNLIMITED, Lines, Source, Value
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels import allowed_keys as allowed
from effattn.lowering.kernels.parameters import parameters
from effattn.lowering.kernels.range_source import Part, flatten, rows_of
from effattn.lowering.kernels.scale import affine_slope
from effattn.lowering.kernels.source import Generator, Sweep
from effattn.lowering.kernels.spec import KernelSpec

WIDEST = 256  # head_dim; two accumulators of a key tile must fit in registers


def no_backward(attention: AttentionSpec, head_dim: int, value_dim: int) -> Refusal | None:
    """Why there is no generated backward for a plan; None if there is one."""
    keys = tile_ranges(attention.rule)
    if affine_slope(attention.score) is None:
        return Refusal(Why.GRADIENT, "the score is not a multiple of s plus a bias")
    if any(load.has(expr.q, expr.k) for load in expr.loads_of(attention.score)):
        reason = "the bias is data for each query or key: a row of nothing but its least value has no exact LSE"
        return Refusal(Why.GRADIENT, reason)
    if keys.powers is not None:
        return Refusal(Why.GRADIENT, "the rows that see a key are not consecutive")
    near = (*(keys.near_lower or ()), *keys.near_upper)
    if any(sympy.sympify(bound).has(expr.h) for bound in (*keys.lower, *keys.upper, *near, keys.prefix or 0)):
        return Refusal(Why.GRADIENT, "heads that share a key see different rows")
    if max(head_dim, value_dim) > WIDEST:
        return Refusal(Why.HEAD_DIM, f"head dimensions over {WIDEST}")
    return None


class BackwardGenerator(Generator):
    """Fills the backward template."""

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self.slope = affine_slope(self.attention.score)
        self.rows_before = Lines()

    def context(self) -> dict[str, Any]:
        slope = self.scalar_text(self.slope, self.before)
        found = super().context()
        for sweep in found["sweeps"]:
            sweep.slope = slope

        def bound_text(bound: Any, row: str) -> str:
            # the query changes during the bisection: no part of a bound may be computed before it
            return self.scalar_text(bound, self.rows_before, row, UNLIMITED)

        ranges = rows_of(self.tile_ranges, bound_text, self.allowed)
        data = "" if self.residual == sympy.true else " but for conditions on data"
        sweeps = [
            self.rows_sweep(f"rows that keep every key of the tile{data}", ranges.full, partial=False),
            self.rows_sweep("rows that keep some keys of the tile", ranges.partial, partial=True),
        ]
        return found | {
            "query_params": parameters(self.spec, "grad_query"),
            "key_params": parameters(self.spec, "grad_key_value"),
            "rows_before": self.rows_before.lines,
            "rows_lines": [*(allowed.sums(True) if self.allowed else ()), *ranges.lines],
            "rows_sweeps": sweeps,
        }

    def rows_sweep(self, title: str, parts: tuple[Part, ...], partial: bool) -> Sweep:
        """Like :meth:`sweep`, with keys as the first axis of a tile and queries as the second."""
        before, steps, count = flatten(parts, "i", "row_tile")
        inside = self.rows_before.inner()
        tile = ("first_key", self.spec.tiles.block_m)
        symbols = self.symbols(q=Value("rows", KEYS, plain=True), k=Value("keys", ROWS, plain=True, tile=tile))
        # the head changes between iterations: terms that depend on it are not computed before the loop
        by_head = any(sympy.sympify(term).has(expr.h) for term in (self.attention.score, self.attention.rule))
        before_loop = inside if by_head else self.rows_before
        algebra = Source(symbols, self.captures, before_loop, inside, key_mask="row_ok", row_mask="key_ok")
        sweep = Sweep(title, partial, count, before, steps, lines=inside.lines)
        sweep.slope = fold(self.slope, algebra).text
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        condition = self.attention.rule if partial else self.residual
        if condition != sympy.true:
            sweep.keep = fold(condition, algebra).spread(TILE)
        return sweep

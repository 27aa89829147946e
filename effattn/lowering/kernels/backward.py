"""Source of the backward: one kernel loops over key tiles, another over query tiles for each key tile."""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.derivative import derivative
from effattn.ir.fold import UnknownOperation, fold
from effattn.ir.refusal import Refusal, Why
from effattn.lowering.dialects.triton.terms import COMPARE, KEYS, ROWS, TILE, UNARY, UNLIMITED, Lines, Source, Value
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels import allowed_keys as allowed
from effattn.lowering.kernels.parameters import parameters
from effattn.lowering.kernels.range_source import Part, flatten, rows_of
from effattn.lowering.kernels.scale import LARGE_LSE, affine_slope, loses_totals
from effattn.lowering.kernels.source import Generator, Sweep
from effattn.lowering.kernels.spec import KernelSpec, Tiles

WIDEST = 256  # head_dim; two accumulators of a key tile must fit in registers


def no_backward(attention: AttentionSpec, head_dim: int, value_dim: int) -> Refusal | None:
    """Why there is no generated backward for a plan; None if there is one."""
    keys = tile_ranges(attention.rule)
    if keys.powers is not None:
        return Refusal(Why.GRADIENT, "the rows that see a key are not consecutive")
    near = (*(keys.near_lower or ()), *keys.near_upper)
    if any(sympy.sympify(bound).has(expr.h) for bound in (*keys.lower, *keys.upper, *near, keys.prefix or 0)):
        return Refusal(Why.GRADIENT, "heads that share a key see different rows")
    if max(head_dim, value_dim) > WIDEST:
        return Refusal(Why.HEAD_DIM, f"head dimensions over {WIDEST}")
    try:
        BackwardGenerator(
            KernelSpec("backward", "exact", attention, "bfloat16", 64, 64, 1, Tiles(16, 16, 4, 1))
        ).source()
    except (UnknownOperation, KeyError) as error:
        return Refusal(Why.GRADIENT, f"no kernel can compute the derivative of the score: {error}")
    return None


class BackwardGenerator(Generator):
    """Fills the backward template."""

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self.factor = affine_slope(self.attention.score)  # of the raw score, if it has one per tile
        self.slope = derivative(self.attention.score) if self.factor is None else self.factor
        self.rows_before = Lines()

    def algebra(self, before: Lines, inside: Lines, **more: Any) -> Source:
        return super().algebra(before, inside, share=self.factor is None, **more)

    def differentiate(self, sweep: Sweep, algebra: Source) -> None:
        sweep.slope = fold(self.slope, algebra).spread(TILE, COMPARE if self.factor is None else UNARY)

    def context(self) -> dict[str, Any]:
        found = super().context()

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
            "totals": loses_totals(self.attention.score),
            "totals_params": parameters(self.spec, "row_totals"),
            "large_lse": LARGE_LSE,
            "varying_slope": self.factor is None,
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
        algebra = Source(symbols, self.captures, before_loop, inside, "row_ok", "key_ok", share=self.factor is None)
        sweep = Sweep(title, partial, count, before, steps, lines=inside.lines)
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        self.differentiate(sweep, algebra)
        condition = self.attention.rule if partial else self.residual
        keep = [] if condition == sympy.true else [fold(condition, algebra)]
        if partial and self.scale is None:  # beyond the last query a score may be NaN
            keep.append(Value("row_ok", KEYS, "bool"))
        if keep:
            sweep.keep = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE)
        return sweep

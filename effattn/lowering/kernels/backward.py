"""Source of the backward: one kernel loops over key tiles, another over query tiles for each key tile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.derivative import affine_slope, derivative
from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import COMPARE, KEYS, ROWS, TILE, UNARY, UNLIMITED, Lines, Source, Value
from effattn.lowering.kernels.parameters import CAPTURED, parameters
from effattn.lowering.kernels.range_source import Ranges, flatten, listed, rows_of
from effattn.lowering.kernels.score_facts import LARGE_LSE, CapturedTerm, captured_terms, loses_totals
from effattn.lowering.kernels.source import Generator, Sweep
from effattn.lowering.kernels.spec import KernelSpec

Loop = tuple[list[str], list[str], str]  # lines before it, lines in it that set the tile number, trip count
# loops over the entries of a list, full ones or partial ones, by the name of the tile number
LISTED: dict[bool, Callable[[str], Loop]] = {
    False: lambda tile: ([], [f"{tile} = tl.load(listed + partial_visited + i)"], "visited - partial_visited"),
    True: lambda tile: ([], [f"{tile} = tl.load(listed + i)"], "partial_visited"),
}


class BackwardGenerator(Generator):
    """Fills the backward template."""

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        if self.over_map:
            self.residual, self.offset = sympy.true, None
        self.factor = affine_slope(self.attention.score)  # of the raw score, if it has one per tile
        self.slope = derivative(self.attention.score) if self.factor is None else self.factor
        terms = captured_terms(spec)
        self.terms = {
            kernel: [term for term in terms if CAPTURED[term.reduced] == kernel] for kernel in CAPTURED.values()
        }
        self.share = self.factor is None or bool(terms)
        keys = self.tile_ranges
        bounds = (*keys.lower, *keys.upper, *(keys.near_lower or ()), *keys.near_upper, keys.prefix or 0)
        of_bounds = bounds if not self.over_map else (self.attention.rule,)
        by_head = any(expr.h in expr.free_symbols(bound) for bound in of_bounds)
        # heads that share a key see other rows, or have sums of their own: one loop for each
        self.by_head = by_head or (spec.groups > 1 and bool(self.terms["grad_key_value"]))
        self.rows_before = Lines()
        self.head_before = self.rows_before.inner() if self.by_head else self.rows_before

    @property
    def over_map(self) -> bool:
        """Whether the tiles come from a block map and its transpose."""
        return bool(self.spec.list_block)

    def ranges(self) -> Ranges:
        return Ranges(listed("tile", "head"), (), ()) if self.over_map else super().ranges()

    def sweeps(self, ranges: Ranges) -> list[Sweep]:
        if not self.over_map:
            return super().sweeps(ranges)
        return [
            self.sweep_over("full blocks: nothing is tested", LISTED[False]("key_tile"), partial=False),
            self.sweep_over("partial blocks: every condition is tested", LISTED[True]("key_tile"), partial=True),
        ]

    def algebra(self, before: Lines, inside: Lines, **more: Any) -> Source:
        return super().algebra(before, inside, share=self.share, **more)

    def differentiate(self, sweep: Sweep, algebra: Source) -> None:
        sweep.slope = fold(self.slope, algebra).spread(TILE, COMPARE if self.factor is None else UNARY)
        sweep.captured = [line for term in self.terms["grad_query"] for line in term_lines(term, algebra)]

    def context(self) -> dict[str, Any]:
        found = super().context()

        def bound_text(bound: Any, row: str) -> str:
            # the query changes during the bisection: no part of a bound may be computed before it
            return self.scalar_text(bound, self.head_before, row, UNLIMITED)

        if self.over_map:
            head = "head" if self.by_head else "(kv_head * GROUPS)"
            ranges = Ranges(listed("first_key // BLOCK_M", head), (), ())
            loops = {partial: LISTED[partial]("row_tile") for partial in (False, True)}
        else:
            ranges = rows_of(self.tile_ranges, bound_text)
            loops = {False: flatten(ranges.full, "i", "row_tile"), True: flatten(ranges.partial, "i", "row_tile")}
        sweeps = [
            self.rows_sweep("rows that keep every key of the tile", loops[False], partial=False),
            self.rows_sweep("rows that keep some keys of the tile", loops[True], partial=True),
        ]
        return found | {
            "query_params": parameters(self.spec, "grad_query"),
            "key_params": parameters(self.spec, "grad_key_value"),
            "totals": loses_totals(self.attention.score),
            "totals_params": parameters(self.spec, "row_totals"),
            "large_lse": LARGE_LSE,
            "varying_slope": self.factor is None,
            "by_head": self.by_head,
            "listed": self.over_map,
            "long": self.spec.long_tiles,
            "rows_before": self.rows_before.lines,
            "head_before": self.head_before.lines if self.by_head else [],
            "rows_lines": ranges.lines,
            "rows_sweeps": sweeps,
            "row_terms": [term for term in self.terms["grad_query"] if term.reduced == "rows"],
            "pair_terms": [term for term in self.terms["grad_query"] if term.reduced == "pairs"],
            "key_terms": self.terms["grad_key_value"],
            "captured": [term for terms in self.terms.values() for term in terms],
            "captured_of_rows": self.buffers("grad_query"),
            "captured_of_keys": self.buffers("grad_key_value"),
            "units": any(term.whole for term in self.terms["grad_query"]),
        }

    def buffers(self, kernel: str) -> str:
        """Arguments of a kernel in the launcher."""
        places = [str(term.number) for term in self.terms[kernel]]
        places += ["-1"] if any(term.whole for term in self.terms[kernel]) else []
        return "".join(f" captured[{place}]," for place in places)

    def rows_sweep(self, title: str, loop: Loop, partial: bool) -> Sweep:
        """Like :meth:`sweep_over`, with keys as the first axis of a tile and queries as the second."""
        before, steps, count = loop
        inside = self.rows_before.inner()
        tile = ("first_key", self.spec.tiles.block_m)
        symbols = self.symbols(q=Value("rows", KEYS, plain=True), k=Value("keys", ROWS, plain=True, tile=tile))
        # in one loop over all heads, terms that depend on the head are not computed before the loop
        by_head = any(sympy.sympify(term).has(expr.h) for term in (self.attention.score, self.attention.rule))
        before_loop = inside if by_head and not self.by_head else self.head_before if by_head else self.rows_before
        algebra = Source(symbols, self.captures, before_loop, inside, "row_ok", "key_ok", share=self.share)
        sweep = Sweep(title, partial, count, before, steps, lines=inside.lines)
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        sweep.slope = fold(self.slope, algebra).spread(TILE, COMPARE if self.factor is None else UNARY)
        sweep.captured = [line for term in self.terms["grad_key_value"] for line in term_lines(term, algebra)]
        condition = self.attention.rule if partial else self.residual
        keep = [] if condition == sympy.true else [fold(condition, algebra)]
        if partial and self.scale is None:  # beyond the last query a score may be NaN
            keep.append(Value("row_ok", KEYS, "bool"))
        if keep:
            sweep.keep = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE)
        return sweep


def term_lines(term: CapturedTerm, algebra: Source, held: Mapping[Any, Any] | None = None) -> list[str]:
    """Statements of a loop over tiles, where ``of_score`` holds the gradient of the scores.

    ``held``: loads to the symbols that stand for them.
    """
    value = "of_score"
    if not term.read.slope.is_number:
        slope = fold(term.read.slope.xreplace(held or {}), algebra).spread(TILE, UNARY)
        if term.read.slope.has(expr.s):  # before the raw scores become scores
            slope = algebra.inside.assign("slope", slope)
        value = f"tl.where(weights == 0.0, 0.0, of_score * {slope})"
    elif term.owned and term.read.slope != 1:
        value = f"of_score * {float(term.read.slope)!r}"
    if term.reduced == "distances":
        return [f"sum_{term.number} += {value}"]
    if term.reduced != "pairs":
        return [f"sum_{term.number} += tl.sum({value}, 1)"]
    indices = [fold(index, algebra) for index in term.read.load.indices]
    address, masks = algebra.address(term.pointer, term.pointer, term.name, indices, TILE)
    if term.owned:
        stored = f"({value}).to({term.pointer}.dtype.element_ty)"
        return [f"tl.store({address}, {stored}{_mask(masks)})"]
    masks.append("(of_score != 0.0)")
    added = "(of_score * unit).to(tl.int64)" if term.whole else value
    return [f'tl.atomic_add({address}, {added}{_mask(masks)}, sem="relaxed")']


def _mask(masks: list[str]) -> str:
    return f", mask={' & '.join(masks)}" if masks else ""

"""Source of the backward for Hopper, in Gluon: two kernels, deterministic, without atomics.

One owns queries and lets keys pass by; the other owns keys and lets the queries of all heads of the group pass by.
Seven products are computed instead of five, and none of them waits for memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import sympy

from effattn.ir import expr
from effattn.ir.derivative import affine_slope, derivative
from effattn.ir.fold import fold
from effattn.ir.refusal import Refusal, Why
from effattn.ir.text import text
from effattn.lowering.dialects.gluon.terms import in_gluon
from effattn.lowering.dialects.triton.terms import KEYS, ROWS, TILE, UNLIMITED, Lines, Value
from effattn.lowering.iteration.tile_ranges import tile_ranges, within_band
from effattn.lowering.kernels import hopper
from effattn.lowering.kernels.hopper import LIST_SIZES, POSITION, HopperForward, Place, list_of, tile_param
from effattn.lowering.kernels.parameters import PARTS, Param, data_parameters, data_sizes, sizes_tested
from effattn.lowering.kernels.range_source import rows_of
from effattn.lowering.kernels.score_facts import loses_totals
from effattn.lowering.kernels.source import LOG2_E, heads_together
from effattn.lowering.kernels.spec import KernelSpec

WIDEST = 128  # head_dim; two accumulators of 64 keys each must fit in a warpgroup's registers
OWNED = 128  # queries, or keys, of a program
TRANSPOSED = ("row_tile_first", "before_tiles", "whole_tile", "whole_tile_end", "partial_count")
LISTS = {"grad_query": ("kv_indices", "kv_num_blocks"), "grad_key_value": ("q_indices", "q_num_blocks")}


@dataclass(frozen=True)
class Gradients:
    """What happens to the raw scores of a tile, as source."""

    lines: list[str]  # needed by the others
    score: str  # empty: a multiple of the raw score
    slope: str  # d score / d raw score; empty: one number for all
    keep: str  # pairs that are kept; empty: all
    keys: bool  # whether the positions of what passes by are needed
    numbers: bool  # and as floats
    loads: bool  # whether captured tensors are read there


def why_not(spec: KernelSpec) -> Refusal | None:
    """Why there is no Gluon kernel for a backward; None if there is one."""
    if (refusal := hopper.why_not_tensors(spec, WIDEST)) is not None:
        return refusal
    attention = spec.attention
    if spec.wanted:
        return Refusal(Why.GRADIENT, "captured tensors that require a gradient are summed by the Triton dialect")
    if spec.list_block and loses_totals(attention.score):
        return Refusal(Why.GRADIENT, "the LSE may be too large to hold how many keys share it, and tiles need a list")
    if spec.groups > 1 and sympy.sympify(attention.rule).has(expr.h):
        return Refusal(Why.GRADIENT, "heads that share a key see different queries")
    ranges = tile_ranges(attention.rule)
    if not spec.list_block and (ranges.residual != sympy.true or ranges.powers is not None):
        return Refusal(Why.EXPRESSION, "the tiles to visit need a list")
    return None


def parameters(spec: KernelSpec, kernel: str) -> list[Param]:
    """The parameters of ``grad_query`` or ``grad_key_value``, in order."""
    tiles, queries = spec.tiles, spec.tiles.block_q
    wide, narrow = spec.block_d, spec.block_dv
    if kernel == "grad_query":
        found = [tile_param(spec, "query", 64, wide), tile_param(spec, "grad_out", 64, narrow)]
        found += [tile_param(spec, "key", tiles.block_n, wide), tile_param(spec, "value", tiles.block_n, narrow)]
        found += [tile_param(spec, "grad_of_query", 64, wide), Param("together", "i32", False)]
    else:
        found = [tile_param(spec, "query", queries, wide), tile_param(spec, "grad_out", queries, narrow)]
        layout = "NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2, transposed=False, "
        vectors = f"tensordesc<fp32[1, {queries}],{layout}fp4_padded=False, cga_layout=[])>"
        names = ["lse_tiles", *(["total_tiles"] if loses_totals(spec.attention.score) else []), "delta_tiles"]
        found += [Param(name, vectors, False) for name in names]
        found += [tile_param(spec, "key", 64, wide), tile_param(spec, "value", 64, narrow)]
        found += [tile_param(spec, "grad_of_key", 64, wide), tile_param(spec, "grad_of_value", 64, narrow)]
    return found + handed(spec, kernel)


def handed(spec: KernelSpec, kernel: str) -> list[Param]:
    """The parameters that every partition of a kernel gets."""
    names = ["row_lse", *(["row_total"] if loses_totals(spec.attention.score) else []), "row_delta"]
    found = [Param(name, "*fp32") for name in names if kernel == "grad_query"]
    if spec.long_tiles and kernel == "grad_key_value":
        found += PARTS
    if spec.list_block:
        found += [Param(name, "*i32") for name in (*LISTS[kernel], "partial_blocks")]
        found += [Param(name, "i32", False) for name in LIST_SIZES]
    found += data_parameters(spec.attention)
    found += [Param(name, "i32", False) for name in ("padded", "heads", "q_len", "k_len")]
    return found + data_sizes(spec.attention)


class HopperBackward(HopperForward):
    """Fills the template of one specialisation."""

    template: ClassVar[str] = "hopper_backward.py.jinja"

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        score = self.attention.score
        factor = affine_slope(score)
        self.factor = float(factor) if factor is not None and factor.is_number else None
        self.slope = None if self.factor is not None else derivative(score)

    @property
    def is_listed(self) -> bool:
        return bool(self.spec.list_block)

    def context(self) -> dict[str, Any]:
        spec, tiles = self.spec, self.spec.tiles
        place = self.listed(OWNED, spec.list_unit) if self.is_listed else self.by_formula()
        row_sweeps = {name: self.rows(name == "partial") for name in ("partial", "full")}
        keys_before, ranges_before = Lines(), Lines()
        key_sweeps = {name: self.keys(name == "partial", keys_before) for name in ("partial", "full")}
        transposed = self.transposed_list() if self.is_listed else self.transposed(ranges_before)
        names = {kernel: [param.name for param in handed(spec, kernel)] for kernel in LISTS}
        plain = [param for kernel in LISTS for param in handed(spec, kernel)]
        return {
            "spec": spec,
            "tiles": tiles,
            "queries": spec.tiles.block_q,
            "query_stages": tiles.partial_stages,
            "predicate_text": text(self.attention.rule),
            "score_text": text(self.attention.score),
            "scale": (1.0 if self.scale is None else self.scale) * LOG2_E,
            "slope": 1.0 if self.factor is None else self.factor,
            "place": place,
            "before": self.before.lines,
            "row_sweeps": row_sweeps,
            "keys_before": keys_before.lines,
            "ranges_before": [in_gluon(line) for line in ranges_before.lines],
            "key_sweeps": key_sweeps,
            "transposed": transposed,
            "transposed_names": ("listed",) if self.is_listed else TRANSPOSED,
            "of_queries": names["grad_query"],
            "of_keys": names["grad_key_value"],
            "unspecialised": sorted({p.name for p in plain if p.type in ("i32", "fp32") and not p.specialise}),
            "listed": self.is_listed,
            "long": spec.long_tiles,
            "totals": loses_totals(self.attention.score),
            "tested": list(sizes_tested(self.attention).values()),
            "together": heads_together(spec),
        }

    def rows(self, partial: bool) -> Gradients:
        """For a program that owns queries."""
        reads = any(load.has(expr.k) for load in expr.loads_of(self.attention.score))
        rule = within_band(self.tile_ranges)
        return self.gradients(partial, self.symbols(), self.before, "key_ok", "row_ok", reads, rule, None, "key")

    def keys(self, partial: bool, before: Lines) -> Gradients:
        """For a program that owns keys: these are the first axis of a tile, queries the second."""
        reads = any(load.has(expr.q) for load in expr.loads_of(self.attention.score))
        row_numbers, key_numbers = Value("row_numbers", KEYS, "float"), Value("key_numbers", ROWS, "float")
        symbols = self.symbols(
            q=Value("rows", KEYS, plain=True, bounds=POSITION, as_float=row_numbers),
            k=Value("keys", ROWS, plain=True, bounds=POSITION, as_float=key_numbers),
        )
        mask = None if self.scale is not None else Value("row_ok", KEYS, "bool")
        rule = self.attention.rule
        return self.gradients(partial, symbols, before, "row_ok", "key_ok", reads, rule, mask, "row")

    def gradients(self, partial, symbols, before: Lines, passing: str, owned: str, reads: bool, rule, mask, name: str):
        inside = before.inner()
        # the head changes while keys are owned: what depends on it is not computed before the loop
        by_head = any(sympy.sympify(term).has(expr.h) for term in (self.attention.score, self.attention.rule))
        first = inside if by_head and name == "row" else before
        checked = passing if partial or reads else ""
        algebra = self.algebra(symbols, self.captures, first, inside, checked, owned, share=self.slope is not None)
        score = slope = ""
        if not partial:
            score = "" if self.scale is not None else fold(self.attention.score, algebra).spread(TILE)
            slope = "" if self.slope is None else fold(self.slope, algebra).spread(TILE)
        keep: list[Value] = []
        if partial:
            keep = [] if rule == sympy.true else [fold(rule, algebra)]
            keep += [] if mask is None else [mask]
        kept = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE) if keep else ""
        used = " ".join([*inside.lines, score, slope, kept])
        position = "keys" if name == "key" else "rows"
        numbers = f"{name}_numbers" in used
        return Gradients(inside.lines, score, slope, kept, reads or position in used, numbers, reads)

    def transposed(self, before: Lines) -> Place:
        def bound(term: Any, row: str) -> str:
            # the query changes during the bisection: no part of a bound may be computed before it
            algebra = self.algebra(self.symbols(q=Value(row)), self.captures, before, longest=UNLIMITED)
            return fold(term, algebra).text

        found = rows_of(self.tile_ranges, bound, tile="QUERIES")
        lines = [
            *found.lines,
            "before_tiles = whole_tile - row_tile_first",
            "partial_count = before_tiles + row_tile_end - whole_tile_end",
            "partial_visited = partial_count",
            "visited = row_tile_end - row_tile_first",
        ]
        steps = [
            "after = whole_tile_end + j - before_tiles",
            "row_tile = gl.where(j < partial_count, after, whole_tile + j - partial_count)",
            "row_tile = gl.where(j < before_tiles, row_tile_first + j, row_tile)",
        ]
        return Place([in_gluon(line) for line in lines], steps)

    def transposed_list(self) -> Place:
        ratio = OWNED // self.spec.tiles.block_q
        found = list_of(*LISTS["grad_key_value"], "kv_head", "key_block", f" * {ratio}")
        return Place(
            [f"key_block = first_key // {OWNED}", *found],
            [f"row_tile = gl.load(listed + j // {ratio}) * {ratio} + j % {ratio}"],
        )

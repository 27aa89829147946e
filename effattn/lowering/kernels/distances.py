"""Source of the gradients of tensors that scores read by the distance of query and key.

A program goes along one diagonal of square tiles, where query and key are equally far apart in every tile: it adds the
gradients of their scores element by element, and sums up along the diagonals of a tile once, at its end. So a distance
is written by two programs of a head, whatever the length.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.distance import DISTANCE, of_distance
from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, ROWS, TILE, Lines, Source, Value
from effattn.lowering.kernels.backward import term_lines
from effattn.lowering.kernels.parameters import parameters
from effattn.lowering.kernels.score_facts import LARGE_LSE, captured_terms, loses_totals
from effattn.lowering.kernels.source import Generator, Sweep
from effattn.lowering.kernels.spec import KernelSpec

Along = dict[str, Value]  # values of symbols


class DistancesGenerator(Generator):
    """Fills the template of one specialisation."""

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self.offset = None  # no tile is shifted
        self.terms = captured_terms(spec)
        self.before_diagonal = Lines()
        self.tests = self.before_diagonal.inner()  # of a tile, whether it keeps any pair

    def context(self) -> dict[str, Any]:
        found = super().context()
        seen, empty_tiles = self.conditions()
        diagonal = self.diagonal()
        return found | {
            "distance_params": parameters(self.spec, "grad_distances"),
            "totals": loses_totals(self.attention.score),
            "totals_params": parameters(self.spec, "row_totals"),
            "large_lse": LARGE_LSE,
            "varying_slope": False,
            "terms": self.terms,
            "seen": seen,
            "empty_tiles": empty_tiles,
            "visible": diagonal.keep,
            "diagonal": replace(diagonal, keep="visible"),
            "before_diagonal": self.before_diagonal.lines,
            "tests": self.tests.lines,
        }

    def conditions(self) -> tuple[str, bool]:
        """Which distances the rule keeps at most, and whether it may keep nothing of a tile of such a distance."""
        parts = sympy.And.make_args(self.attention.rule)
        of_distances = [found for part in parts if (found := of_distance(part)) is not None and found.has(DISTANCE)]
        others = [part for part in parts if of_distance(part) is None]
        along = self.symbols() | {DISTANCE.name: Value("distances", ROWS, plain=True)}
        algebra = Source(along, self.captures, self.before_diagonal, row_mask="")
        kept = [fold(part, algebra) for part in of_distances]
        seen = reduce(lambda x, y: algebra.call("and", x, y), kept).text if kept else ""
        return seen, any(expr.q in part.free_symbols and expr.k in part.free_symbols for part in others)

    def diagonal(self) -> Sweep:
        """The loop over the tiles of a diagonal. What is the same in all of them is found before it."""
        tile = self.spec.tiles.block_n
        distance = Value("distance", TILE, plain=True)
        outside = Source(self.symbols() | {DISTANCE.name: distance}, self.captures, self.before_diagonal, row_mask="")
        held: dict[Any, Any] = {}
        values: Along = {}
        for number, load in enumerate(sorted(expr.loads_of(self.attention.score), key=str)):
            if load.has(expr.q) and load.has(expr.k) and (found := of_distance(load)) is not None:
                symbol = sympy.Symbol(f"of distance {number}", real=True, integer=load.is_integer)
                held[load], values[symbol.name] = symbol, fold(found, outside)
        lines = self.before_diagonal.inner()
        symbols = self.symbols(
            q=Value("rows", ROWS, plain=True, tile=("first_row", tile)),
            k=Value("keys", KEYS, plain=True, tile=("start", tile)),
        )
        algebra = Source(symbols | values, self.captures, lines, lines, key_mask="key_ok", share=True)
        sweep = Sweep("", True, "", [], [], lines=lines.lines)
        sweep.score = fold(self.attention.score.xreplace(held), algebra).spread(TILE)
        sweep.captured = [line for term in self.terms for line in term_lines(term, algebra, held)]
        testing = Source(symbols, self.captures, self.tests, self.tests, key_mask="key_ok")
        keep = [Value("row_ok", ROWS, "bool"), Value("key_ok", KEYS, "bool")]
        if self.attention.rule != sympy.true:
            keep.insert(0, fold(self.attention.rule, testing))
        sweep.keep = reduce(lambda x, y: testing.call("and", x, y), keep).spread(TILE)
        return sweep

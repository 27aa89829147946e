"""Source of attention over a block list: the prefill kernel, with the keys to visit read from ``kv_indices``.

The list comes from a block map, where nothing is tested in full blocks, or from a selector.

A query tile lies within one query block, so it has one list. Units at least as wide as a key tile are visited tile by
tile. Smaller units, or single tokens, are gathered into a tile.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy

from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, TILE, Source, Value
from effattn.lowering.kernels.range_source import Ranges, listed
from effattn.lowering.kernels.source import Generator, Sweep
from effattn.lowering.kernels.spec import KernelSpec

GATHER = (
    "place = ({first} + i) * BLOCK_N + columns",
    "key_ok = place < visited * LIST_UNIT",
    "keys = tl.load(listed + place // LIST_UNIT, mask=key_ok, other=0) * LIST_UNIT + place % LIST_UNIT",
    "key_ok = key_ok & (keys < k_len)",
)
TILES = "(LIST_UNIT // BLOCK_N)"


class ListedGenerator(Generator):
    """Fills the prefill template."""

    @property
    def template(self) -> str:
        return "prefill"

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self.offset = None  # tiles begin at blocks of the list
        if not spec.tests_data:
            self.residual = sympy.true

    @property
    def gathered(self) -> bool:
        return self.spec.list_unit < self.spec.tiles.block_n

    def context(self) -> dict[str, Any]:
        more = {"gathered": self.gathered, "list_block": self.spec.list_block, "list_unit": self.spec.list_unit}
        return super().context() | more

    def ranges(self) -> Ranges:
        lines = list(listed("tile_row // LIST_BLOCK", "head"))
        if self.gathered:
            lines.append("partial_turns = tl.cdiv(partial_visited * LIST_UNIT, BLOCK_N)")
        return Ranges(tuple(lines), (), ())

    def sweeps(self, ranges: Ranges) -> list[Sweep]:
        if self.gathered:
            whole = "tl.cdiv(visited * LIST_UNIT, BLOCK_N) - partial_turns"
            partial_steps = [line.format(first="0") for line in GATHER]
            whole_steps = [line.format(first="partial_turns") for line in GATHER]
            partial = "partial_turns"
        else:
            partial, whole = f"partial_visited * {TILES}", f"(visited - partial_visited) * {TILES}"
            partial_steps = [f"key_tile = tl.load(listed + i // {TILES}) * {TILES} + i % {TILES}"]
            whole_steps = [f"key_tile = tl.load(listed + partial_visited + i // {TILES}) * {TILES} + i % {TILES}"]
        data = "only conditions on data are tested" if self.residual != sympy.true else "nothing is tested"
        found = [
            self.listed_sweep("partial blocks: every condition is tested", partial, partial_steps, True),
            self.listed_sweep(f"the other blocks: {data}", whole, whole_steps, False),
        ]
        found[0].stages = self.spec.tiles.partial_stages
        return found

    def listed_sweep(self, title: str, count: str, steps: list[str], partial: bool) -> Sweep:
        inside = self.before.inner()
        key_mask = "key_ok" if partial or self.gathered else ""
        algebra = Source(self.symbols(), self.captures, self.before, inside, key_mask=key_mask)
        sweep = Sweep(title, partial, count, [], steps, lines=inside.lines, gathered=self.gathered)
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        condition = self.attention.rule if partial else self.residual
        keep = [] if condition == sympy.true else [fold(condition, algebra)]
        if key_mask:
            keep.append(Value(key_mask, KEYS, "bool"))
        if keep:
            sweep.keep = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE)
        sweep.guard = bool(keep) or self.may_mask
        sweep.reads_keys = "keys" in " ".join([*inside.lines, sweep.score, sweep.keep])
        return sweep

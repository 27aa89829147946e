"""The source of attention over a block list: the prefill kernel, with the keys to visit read from an order table.

A tile of rows lies within one query block, so it has one list. Units at least as wide as a tile of keys are visited
tile by tile; several smaller ones, or single tokens, share a tile whose keys are gathered.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy

from effattn.ir.fold import fold
from effattn.lowering.dialects.triton.terms import KEYS, TILE, Source, Value
from effattn.lowering.kernels.range_source import Ranges
from effattn.lowering.kernels.source import Generator, Sweep

# where the list of a tile of rows stands, and how much of it is visited
LIST = (
    "row_block = tile_row // LIST_BLOCK",
    "order += ((batch * lists + head // (heads // lists)).to(tl.int64) * row_blocks + row_block) * width",
    "count = tl.load(counts + (batch * counted + head // (heads // counted)) * row_blocks + row_block)",
    "edge_count = tl.minimum(tl.load(edges + row_block), count)",
)
GATHER = (
    "place = ({first} + i) * BLOCK_N + columns",
    "key_ok = place < count * LIST_UNIT",
    "keys = tl.load(order + place // LIST_UNIT, mask=key_ok, other=0) * LIST_UNIT + place % LIST_UNIT",
    "key_ok = key_ok & (keys < k_len)",
)
TILES = "(LIST_UNIT // BLOCK_N)"


class ListedGenerator(Generator):
    """Fills the template of prefill."""

    @property
    def template(self) -> str:
        return "prefill"

    @property
    def gathered(self) -> bool:
        return self.spec.list_unit < self.spec.tiles.block_n

    def context(self) -> dict[str, Any]:
        more = {"gathered": self.gathered, "list_block": self.spec.list_block, "list_unit": self.spec.list_unit}
        return super().context() | more

    def ranges(self) -> Ranges:
        lines = list(LIST)
        if self.gathered:
            lines.append("edge_turns = tl.cdiv(edge_count * LIST_UNIT, BLOCK_N)")
        return Ranges(tuple(lines), (), ())

    def sweeps(self, ranges: Ranges) -> list[Sweep]:
        if self.gathered:
            whole = "tl.cdiv(count * LIST_UNIT, BLOCK_N) - edge_turns"
            edge_steps, whole_steps = ([line.format(first=first) for line in GATHER] for first in ("0", "edge_turns"))
            edge = "edge_turns"
        else:
            edge, whole = f"edge_count * {TILES}", f"(count - edge_count) * {TILES}"
            edge_steps = [f"key_tile = tl.load(order + i // {TILES}) * {TILES} + i % {TILES}"]
            whole_steps = [f"key_tile = tl.load(order + edge_count + i // {TILES}) * {TILES} + i % {TILES}"]
        data = "" if self.residual == sympy.true else ": only conditions on data are tested"
        found = [
            self.listed_sweep("units with positions of the rows: every condition is tested", edge, edge_steps, True),
            self.listed_sweep(f"the other units, before all rows{data}", whole, whole_steps, False),
        ]
        found[0].stages = self.spec.tiles.edge_stages
        return found

    def listed_sweep(self, title: str, count: str, steps: list[str], edge: bool) -> Sweep:
        inside = self.before.inner()
        key_mask = "key_ok" if edge or self.gathered else ""
        algebra = Source(self.symbols(), self.captures, self.before, inside, key_mask=key_mask)
        sweep = Sweep(title, edge, count, [], steps, lines=inside.lines, gathered=self.gathered)
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        condition = self.attention.rule if edge else self.residual
        keep = [] if condition == sympy.true else [fold(condition, algebra)]
        if key_mask:
            keep.append(Value(key_mask, KEYS, "bool"))
        if keep:
            sweep.keep = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE)
        sweep.guard = bool(keep) or self.may_mask
        sweep.reads_keys = "keys" in " ".join([*inside.lines, sweep.score, sweep.keep])
        return sweep

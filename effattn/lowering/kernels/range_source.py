"""Tile ranges as scalar code: which key tiles a query tile visits, and which of them are full.

Everything is counted in tiles of ``BLOCK_N`` keys. A *segment* is a run of consecutive tile numbers, or of places in
the list of power-of-two blocks. It is cut into up to three parts: partial tiles on the left, full tiles, partial tiles
on the right. Segments do not overlap. One loop runs over the full parts of all segments, another over the partial
parts. Both compute the tile number from the loop counter, so that the load pipeline does not drain between segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from effattn.ir.expr import q
from effattn.lowering.iteration.tile_ranges import PowerList, TileRanges

Text = Callable[[Any, str], str]  # (bound, name of a query) -> source of the bound at that query


@dataclass(frozen=True)
class Part:
    """Tiles ``first`` to ``end``, exclusive; ``listed``: places in the block list instead of tile numbers."""

    name: str
    first: str
    end: str
    listed: bool = False


@dataclass(frozen=True)
class Ranges:
    """Scalar code that defines the parts, and the parts: full tiles and partial tiles."""

    lines: tuple[str, ...]
    full: tuple[Part, ...]
    partial: tuple[Part, ...]


def position_offset(powers: PowerList, block_m: int, block_n: int) -> Any | None:
    """c if the position of query q is q + c and tiles divide the blocks; None if the list cannot be aligned."""
    offset = sympy.expand(powers.position - q)
    if offset.has(q) or powers.block % block_m or powers.block % block_n or powers.block & (powers.block - 1):
        return None
    return offset


def visits(ranges: TileRanges, text: Text, aligned: bool, split: bool, allowed: bool = False) -> Ranges:
    """The parts that a tile with queries ``first_row`` to ``last_row`` visits.

    Args:
        text: source of a bound at a query.
        aligned: the queries of a tile are in one block of the block list, ``position_block``.
        split: separate full from partial tiles; else every tile is partial.
        allowed: only keys from ``allowed_first`` to ``allowed_end`` are kept; not with ``split``.
    """
    builder = _Builder(text, split, allowed)
    builder.outer(ranges)
    if not ranges.choice or (ranges.powers is not None and not aligned):
        builder.split = split and not ranges.choice
        builder.segment("band", "outer_tile", "outer_end", "full_tile", "full_end", bool(ranges.lower))
    else:
        builder.choose(ranges)
    return Ranges(tuple(builder.lines), tuple(builder.full), tuple(builder.partial))


class _Builder:
    def __init__(self, text: Text, split: bool, allowed: bool):
        self.text = text
        self.split = split
        self.allowed = allowed
        self.lines: list[str] = []
        self.full: list[Part] = []
        self.partial: list[Part] = []

    def let(self, name: str, value: str) -> None:
        self.lines.append(f"{name} = {value}")

    def bound(self, bounds, row: str, function: str, start: list[str]) -> str:
        """The maximum or minimum of some bounds at a query."""
        texts = start + [self.text(bound, row) for bound in bounds]
        result = texts[0]
        for other in texts[1:]:
            result = f"tl.{function}({result}, {other})"
        return result

    def outer(self, ranges: TileRanges) -> None:
        """Keys that some query may visit and keys that every query keeps, by the conditions outside the choice."""
        within = "tl.minimum({}, k_len).to(tl.int32)".format
        zero, k_len = ("allowed_first", "allowed_end") if self.allowed else ("0", "k_len")
        if ranges.lower or self.allowed:
            self.let("some_first", within(self.bound(ranges.lower, "first_row", "maximum", [zero])))
            self.let("outer_tile", "some_first // BLOCK_N")
        else:
            self.let("outer_tile", "0")
        self.let("some_end", f"tl.maximum({self.bound(ranges.upper, 'last_row', 'minimum', [k_len])}, 0).to(tl.int32)")
        self.let("outer_end", "tl.maximum(tl.cdiv(some_end, BLOCK_N), outer_tile)")
        if not self.split:
            return
        if ranges.lower:
            self.let("every_first", within(self.bound(ranges.lower, "last_row", "maximum", [zero])))
            self.let("full_tile", "tl.cdiv(every_first, BLOCK_N)")
        else:
            self.let("full_tile", "0")
        every_end = self.bound(ranges.upper, "first_row", "minimum", [k_len])
        self.let("every_end", f"tl.maximum({every_end}, 0).to(tl.int32)")
        self.let("full_end", "every_end // BLOCK_N")

    def choose(self, ranges: TileRanges) -> None:
        """Segments of the choice: prefix, the list between prefix and near band, the near band."""
        middle, right = "outer_tile", "outer_end"
        outer_left = bool(ranges.lower)
        if ranges.prefix is not None:
            prefix = f"tl.maximum({self.text(ranges.prefix, 'first_row')}, 0)"
            self.let("prefix_keys", f"tl.minimum({prefix}, k_len).to(tl.int32)")
            self.let("prefix_end", _clamp("tl.cdiv(prefix_keys, BLOCK_N)", "outer_tile", "outer_end"))
            full = "tl.minimum(prefix_keys // BLOCK_N, full_end)"
            self.segment("prefix", "outer_tile", "prefix_end", "full_tile", full, outer_left)
            middle = "prefix_end"
        if ranges.near_lower is not None:
            self.near(ranges, middle)
            right = "near_tile"
        if ranges.powers is not None:
            self.listed("far", middle, right, outer_left)
            if ranges.near_lower is not None and ranges.near_upper:
                self.listed("ahead", "near_end", "outer_end", outer_left)

    def near(self, ranges: TileRanges, middle: str) -> None:
        lower, upper = ranges.near_lower or (), ranges.near_upper
        if lower:
            first = self.bound(lower, "first_row", "maximum", ["0"])
            self.let("near_first", f"tl.minimum({first}, k_len).to(tl.int32) // BLOCK_N")
            self.let("near_tile", _clamp("near_first", middle, "outer_end"))
        else:
            self.let("near_tile", middle)
        if upper:
            end = self.bound(upper, "last_row", "minimum", ["k_len"])
            self.let("near_keys", f"tl.maximum({end}, 0).to(tl.int32)")
            self.let("near_end", _clamp("tl.cdiv(near_keys, BLOCK_N)", "near_tile", "outer_end"))
        else:
            self.let("near_end", "outer_end")
        full_tile, full_end = "full_tile", "full_end"
        if self.split and lower:
            first = self.bound(lower, "last_row", "maximum", ["0"])
            self.let("near_every", f"tl.cdiv(tl.minimum({first}, k_len).to(tl.int32), BLOCK_N)")
            full_tile = "tl.maximum(near_every, full_tile)"
        if self.split and upper:
            end = self.bound(upper, "first_row", "minimum", ["k_len"])
            self.let("near_whole", f"tl.maximum({end}, 0).to(tl.int32) // BLOCK_N")
            full_end = "tl.minimum(near_whole, full_end)"
        self.segment("near", "near_tile", "near_end", full_tile, full_end, bool(lower or ranges.lower))

    def listed(self, name: str, first: str, end: str, has_left: bool) -> None:
        """Tiles of listed blocks in ``[first, end)``. Places in the list run from right to left."""

        def place(tile: str) -> str:
            return f"_listed_from({tile}, position_block, LIST_TILES)"

        self.let(f"{name}_place", place(end))
        self.let(f"{name}_last", place(first))
        if not self.split:
            self.partial.append(Part(name, f"{name}_place", f"{name}_last", True))
            return
        self.let(f"{name}_full_end", place(_clamp("full_end", first, end)))
        left = f"{name}_last"
        if has_left:
            left = f"{name}_left"
            self.let(left, f"tl.maximum({place(_clamp('full_tile', first, end))}, {name}_full_end)")
            self.partial.append(Part(f"{name}_left", left, f"{name}_last", True))
        self.full.append(Part(name, f"{name}_full_end", left, True))
        self.partial.append(Part(f"{name}_right", f"{name}_place", f"{name}_full_end", True))

    def segment(self, name: str, first: str, end: str, full: str, full_end: str, has_left: bool) -> None:
        if not self.split:
            self.partial.append(Part(name, first, end))
            return
        left = first
        if has_left:
            left = f"{name}_full"
            self.let(left, _clamp(full, first, end))
            self.partial.append(Part(f"{name}_left", first, left))
        self.let(f"{name}_full_end", _clamp(full_end, left, end))
        self.full.append(Part(name, left, f"{name}_full_end"))
        self.partial.append(Part(f"{name}_right", f"{name}_full_end", end))


def listed(block: str, head: str) -> tuple[str, ...]:
    """Code that finds the list of one block: ``listed`` points to its first entry, ``visited`` and ``partial_visited``
    say how many there are and how many of them are partial. Strides of what is shared are 0.
    """
    return (
        f"list_block = ({block}).to(tl.int64)",
        f"own_list = ({head} // (heads // lists)).to(tl.int64)",
        f"own_count = ({head} // (heads // counted)).to(tl.int64)",
        "listed = kv_indices + batch.to(tl.int64) * kv_indices_stride_b + own_list * kv_indices_stride_h",
        "listed += list_block * width",
        "counts = batch.to(tl.int64) * kv_num_blocks_stride_b + own_count * kv_num_blocks_stride_h",
        "visited = tl.load(kv_num_blocks + counts + list_block)",
        "counts = batch.to(tl.int64) * partial_blocks_stride_b + own_list * partial_blocks_stride_h",
        "partial_visited = tl.minimum(tl.load(partial_blocks + counts + list_block), visited)",
    )


def rows_of(ranges: TileRanges, text: Text, tile: str = "BLOCK_N") -> Ranges:
    """The transpose: tiles of queries that visit a tile of keys ``first_key`` to ``last_key``.

    Bounds never decrease in q, so the queries are consecutive, and bisection finds both ends. Tile ranges with a block
    list have no such ends. ``tile``: the name of the number of queries of a tile.
    """
    conditions = {
        "rows_first": ("first_key", ranges.upper, ranges.near_upper, "all"),
        "rows_end": ("last_key", ranges.lower, ranges.near_lower, "any"),
        "whole_first": ("last_key", ranges.upper, ranges.near_upper, "all"),
        "whole_end": ("first_key", ranges.lower, ranges.near_lower, "any"),
    }
    lines: list[str] = []
    prefix = None if ranges.prefix is None else text(ranges.prefix, "middle")
    for name, (key, bounds, near, join) in conditions.items():
        found = [f"({key} < {text(bound, 'middle')})" for bound in bounds]
        if ranges.choice:
            outside = (
                "True" if prefix is None else f"({'first_key' if name.startswith('rows') else 'last_key'} >= {prefix})"
            )
            inside = (
                "False" if prefix is None else f"({'first_key' if name.startswith('rows') else 'last_key'} < {prefix})"
            )
            close = [f"({key} < {text(bound, 'middle')})" for bound in near or ()]
            if join == "all" and close:
                found.append(f"({inside} | ({' & '.join(close)}))")
            if join == "any" and (close or near is None):
                found.append(f"({outside} & ({' | '.join(close) or 'True'}))")
        lines += _bisection(name, (" & " if join == "all" else " | ").join(found), "0" if join == "all" else "q_len")
    lines += [
        f"row_tile_first = rows_first // {tile}",
        f"row_tile_end = tl.maximum(tl.cdiv(rows_end, {tile}), row_tile_first)",
        f"whole_tile = {_clamp(f'tl.cdiv(whole_first, {tile})', 'row_tile_first', 'row_tile_end')}",
        f"whole_tile_end = {_clamp(f'whole_end // {tile}', 'whole_tile', 'row_tile_end')}",
    ]
    partial = (Part("before", "row_tile_first", "whole_tile"), Part("after", "whole_tile_end", "row_tile_end"))
    return Ranges(tuple(lines), (Part("whole", "whole_tile", "whole_tile_end"),), partial)


def _bisection(name: str, condition: str, without: str) -> list[str]:
    """Code that sets ``name`` to the first query for which ``condition`` on ``middle`` holds, q_len if there is
    none."""
    if not condition:
        return [f"{name} = {without}"]
    return [
        "low, high = q_len * 0, q_len",
        "while low < high:",
        "    middle = (low + high) // 2",
        f"    holds = {condition}",
        "    low, high = tl.where(holds, low, middle + 1), tl.where(holds, middle, high)",
        f"{name} = low",
    ]


def _clamp(value: str, low: str, high: str) -> str:
    return f"tl.minimum(tl.maximum({value}, {low}), {high})"


def flatten(parts: tuple[Part, ...], counter: str, tile_name: str = "key_tile") -> tuple[list[str], list[str], str]:
    """One loop over several parts.

    Returns:
        Lines before the loop, lines in the loop that set the tile number from ``counter``, and the trip count.
    """
    before: list[str] = []
    steps: list[str] = []
    count = ""
    for part in parts:
        base = part.first if not count else f"{part.name}_base"
        if count:
            before.append(f"{base} = {part.first} - {part.name}_turn")
        place = f"{base} + {counter}"
        tile = f"_listed_tile({place}, position_block, LIST_TILES)" if part.listed else place
        steps.append(tile if not count else f"tl.where({counter} < {part.name}_turn, {tile_name}, {tile})")
        here = f"{part.end} - {part.first}"
        count = here if not count else f"{part.name}_turn + {here}"
        if part is not parts[-1]:
            following = parts[parts.index(part) + 1]
            before.append(f"{following.name}_turn = {count}")
    return before, [f"{tile_name} = {step}" for step in steps], count or "0"

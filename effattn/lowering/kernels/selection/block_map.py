"""Source of a block map: which blocks of keys each block of queries visits, from ranges instead of tokens.

``tabulate`` writes the least and the greatest value of every table of the rule in each block of tokens
(:mod:`effattn.lowering.iteration.block_rule`), ``tabulate_pairs`` those of tensors with a value for each pair.
``list_blocks`` evaluates the rule on pairs of blocks, and writes the list of one block of rows: partial blocks first.
Rows are queries, or keys where the map is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.bounds import INT32, INT64, TRUTH, Interval
from effattn.ir.fold import fold
from effattn.ir.text import text
from effattn.lowering.dialects.triton.terms import (
    ATOM,
    COMPARE,
    FAR,
    KEYS,
    NARROW,
    ROWS,
    SCALAR,
    TILE,
    Lines,
    Source,
    Value,
    all_symbols,
    tested_dims,
)
from effattn.lowering.iteration.block_rule import BlockRule, Table, block_rule
from effattn.lowering.iteration.intervals import BlockAlgebra, Chunks, element
from effattn.lowering.iteration.ranges import Range
from effattn.lowering.kernels.parameters import Param, data_parameters, data_sizes
from effattn.lowering.kernels.rendering import helpers_for, template_named, tidy
from effattn.lowering.kernels.spec import padded

COLUMNS = 256  # blocks that a program looks at together
WARPS = 4
KERNELS = ("tabulate", "tabulate_pairs", "list_blocks")


@dataclass(frozen=True)
class MapSpec:
    """One specialisation of a block map."""

    attention: AttentionSpec  # only its rule counts, and what that reads
    block_m: int  # queries of a block
    block_n: int  # keys of a block
    transposed: bool = False
    wide: bool = False  # as in KernelSpec

    chunks: tuple[Chunks, ...] = ()  # whose tensors follow the captured ones: see :func:`chunks_of`

    @property
    def rule(self) -> BlockRule:
        return block_rule(self.attention.rule)

    @property
    def captured(self) -> tuple[CaptureSpec, ...]:
        """All captured tensors, in the order in which they are passed."""
        given = {load.name: load for load in self.attention.captures}
        found = list(self.attention.captures)
        for chunks in self.chunks:
            load = given[chunks.name]
            dtype = "uint8" if load.dtype == "bool" else load.dtype
            found += [CaptureSpec(name, dtype, load.ndim) for name in chunks.names]
        return tuple(found)


@dataclass(frozen=True)
class Entry:
    """A table with its place in the buffer of its kind, and the source that computes it."""

    table: Table
    kind: str  # "int" or "float"
    place: int
    bounds: Interval
    value: str

    @property
    def narrow(self) -> bool:
        """Whether its values are computed in 32 bits."""
        return self.kind == "int" and self.bounds.within(INT32)


def sizes_tested(spec: MapSpec) -> dict[str, list[int]]:
    """Captured tensor -> dimensions whose index kernels check: more than attention kernels do, as q is a block here."""
    tested: dict[str, set[int]] = {load.name: set() for load in spec.captured}
    rule = spec.rule
    for load in expr.loads_of(*(table.term for table in rule.tables), sympy.true):
        tested[load.name].update(tested_dims(load))
    for load in expr.loads_of(rule.rule):
        if load.name in tested:
            positions = [dim for dim, index in enumerate(load.indices) if index in (expr.q, expr.k)]
            tested[load.name].update(tested_dims(load), positions)
    for chunks in spec.chunks:
        tested |= dict.fromkeys(chunks.names, tested[chunks.name])
    return {name: sorted(dims) for name, dims in tested.items()}


def parameters(spec: MapSpec, kernel: str) -> list[Param]:
    """The parameters of one of ``KERNELS``, in order."""
    tables = [Param("ints", "*i64"), Param("floats", "*fp32")]
    pairs = [Param("int_pairs", "*i64"), Param("float_pairs", "*fp32")]
    lists = [Param("indices", "*i32")]
    pointers = {"tabulate": tables, "tabulate_pairs": pairs, "list_blocks": [*tables, *pairs, *lists]}[kernel]
    sizes = {
        "tabulate": ("table_heads",),
        "tabulate_pairs": ("pair_heads",),
        "list_blocks": ("map_heads", "table_stride_b", "table_stride_h", "pair_stride_b", "pair_stride_h"),
    }[kernel]
    attention = replace(spec.attention, captures=spec.captured)
    found = [*pointers, *data_parameters(attention)]
    found += [Param(name, "i32", False) for name in (*sizes, "q_blocks", "k_blocks", "q_len", "k_len")]
    return found + data_sizes(attention, sizes_tested(spec))


class MapSource(Source):
    """Triton source whose scalar conditions on floats can be combined with vectors by Triton's interpreter too."""

    def _operation(self, operation, *args):
        found = super()._operation(operation, *args)
        if found.kind == "bool" and found.axes == SCALAR and any(arg.kind == "float" for arg in args):
            return Value(f"tl.where({found.text}, 1, 0) != 0", kind="bool", level=COMPARE)
        return found


class MapGenerator:
    """Fills the template of one specialisation."""

    def __init__(self, spec: MapSpec):
        self.spec, self.rule = spec, spec.rule
        self.captures = {load.name: load for load in spec.captured}
        self.chunks: list[Chunks] = []  # that it would read
        whole = Lines()
        self.lines = {side: whole.inner() for side in ("q", "k", "qk")}
        self.entries: dict[str, Entry] = {}
        places: dict[tuple, int] = {}
        for table in self.rule.tables:
            value = self.tabulated(table)
            axes = TILE if table.side == "qk" else KEYS
            kind = "float" if value.kind == "float" else "int"
            key = (kind, table.side == "qk")
            place = places[key] = places.get(key, -1) + 1
            within = TRUTH if table.is_condition else value.bounds if value.bounds.within(INT64) else INT64
            self.entries[table.name] = Entry(table, kind, place, within, value.spread(axes))

    def of(self, *sides: str) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.table.side in sides]

    def count(self, kind: str, *sides: str) -> int:
        """Tables of a kind."""
        return sum(entry.kind == kind for entry in self.of(*sides))

    def symbols(self, **more: Value) -> dict[str, Value]:
        indices = {"b": Value("batch", plain=True), "h": Value("head", plain=True), **more}
        return all_symbols(indices, self.spec.attention, self.spec.wide)

    def tabulated(self, table: Table) -> Value:
        """A term at tokens: a vector, or a tile for each pair."""
        lines = self.lines[table.side]
        axes = {"q": (KEYS, SCALAR), "k": (SCALAR, KEYS), "qk": (ROWS, KEYS)}[table.side]
        tokens = {"q": "rows", "k": "keys"}
        symbols = self.symbols(**{name: Value(tokens[name], axes[i], plain=True) for i, name in enumerate("qk")})
        mask = {"q": "row_ok", "k": "key_ok", "qk": "key_ok"}[table.side]
        return fold(table.term, Source(symbols, self.captures, lines, lines, key_mask=mask))

    def source(self) -> str:
        template = template_named("block_map.py.jinja")
        context = self.context()
        body = template.render(context, helpers="")
        return tidy(template.render(context, helpers=helpers_for(body)))

    def context(self) -> dict[str, Any]:
        spec, rule = self.spec, self.rule
        before, inside, some, every = self.condition()
        params = {kernel: parameters(spec, kernel) for kernel in KERNELS}
        return {
            "predicate_text": text(spec.attention.rule),
            "block_m": spec.block_m,
            "block_n": spec.block_n,
            "padded_m": padded(spec.block_m),
            "padded_n": padded(spec.block_n),
            "transposed": spec.transposed,
            "warps": WARPS,
            "columns": COLUMNS,
            "params": params,
            "unspecialised": {
                kernel: [p.name for p in found if p.type in ("i32", "fp32") and not p.specialise]
                for kernel, found in params.items()
            },
            "entries": {side: self.of(side) for side in ("q", "k", "qk")},
            "lines": {side: lines.lines for side, lines in self.lines.items()},
            "number": {
                "int": self.count("int", "q", "k"),
                "float": self.count("float", "q", "k"),
                "int_pairs": self.count("int", "qk"),
                "float_pairs": self.count("float", "qk"),
            },
            "table_by": self.depends("q", "k"),
            "pair_by": self.depends("qk"),
            "by_batch": rule.by_batch,
            "by_head": rule.by_head,
            "numbers": [name for name in spec.attention.numbers if spec.attention.rule.has(expr.number(name))],
            "before": before,
            "inside": inside,
            "some": some,
            "every": every,
            "tested": list(sizes_tested(spec).values()),
            "listed": False,
        }

    def depends(self, *sides: str) -> tuple[bool, bool]:
        """Whether tables of these sides depend on the batch, and on the head."""
        symbols = expr.free_symbols(*(entry.table.term for entry in self.of(*sides)))
        return expr.b in symbols, expr.h in symbols

    def condition(self) -> tuple[list[str], list[str], str, str]:
        """Lines of a program, lines for its columns, whether some pair of tokens is kept, and whether all are."""
        before = Lines()
        inside = before.inner()
        below = MapSource(self.symbols(), self.captures, before, inside, key_mask="column_ok")

        def load(name: str, indices: Sequence[Range]) -> Range:
            if name in self.entries:
                return self.looked_up(self.entries[name], before, inside)
            return element(algebra, name, indices, self.captures[name].dtype, self.given)

        ranges = {"q": self.positions("q"), "k": self.positions("k")}
        algebra = BlockAlgebra(below, ranges, load, FAR if self.spec.wide else NARROW)
        truth = fold(self.rule.rule, algebra)
        return before.lines, inside.lines, truth.some.at(ATOM), truth.every.at(ATOM)

    def given(self, chunks: Chunks) -> bool:
        self.chunks.append(chunks)
        return chunks in self.spec.chunks

    def is_row(self, side: str) -> bool:
        return (side == "k") == self.spec.transposed

    def positions(self, side: str) -> Range:
        axes = SCALAR if self.is_row(side) else KEYS
        block = self.spec.block_m if side == "q" else self.spec.block_n
        what = "row" if self.is_row(side) else "column"
        within = FAR if self.spec.wide else Interval(0, NARROW.high)
        low, high = (Value(f"{end}_{what}", axes, bounds=within) for end in ("first", "last"))
        return Range(low, high, "int", within, span=block - 1, aligned=block)

    def looked_up(self, entry: Entry, before: Lines, inside: Lines) -> Range:
        """The ends of a table's term in a block, or a pair of blocks."""
        side = entry.table.side
        row = side != "qk" and self.is_row(side)
        buffer = f"{entry.kind}_pairs" if side == "qk" else f"{entry.kind}s"
        lines, axes = (before, SCALAR) if row else (inside, KEYS)
        ends: list[Value] = []
        for end in range(2):
            place = f"{2 * entry.place + end}"
            if side == "qk":
                at = f"{buffer}_here + {place} * pair_count + pairs"
            else:
                at = f"{buffer}_here + {place} * table_width + " + ("row_block" if row else "columns")
            loaded = f"tl.load({at})" if row else f"tl.load({at}, mask=column_ok, other=0)"
            name = lines.assign("least" if end == 0 else "most", loaded + (".to(tl.int32)" if entry.narrow else ""))
            wide = entry.kind == "int" and not entry.narrow
            ends.append(Value(name, axes, entry.kind, bounds=entry.bounds, wide=wide))
        return Range(ends[0], ends[1], entry.kind, entry.bounds)


def chunks_of(spec: MapSpec) -> tuple[Chunks, ...]:
    """The chunks of captured tensors whose extremes say what many of their elements may be."""
    made = MapGenerator(spec)
    made.condition()
    return tuple(dict.fromkeys(made.chunks))


def generate(spec: MapSpec) -> str:
    """The source of the kernels and ``launch``.

    Raises:
        UnknownOperation: kernels cannot compute an operation of the rule.
    """
    return MapGenerator(spec).source()

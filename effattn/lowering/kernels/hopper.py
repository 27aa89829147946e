"""Source of the forward for Hopper, in Gluon: one warp copies tiles, two or three warpgroups compute.

The keys to visit come by formula or from a list, as in the Triton dialect; partial tiles first. Only there the
predicate is tested.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import sympy

from effattn.ir import expr
from effattn.ir.bounds import Interval
from effattn.ir.fold import fold
from effattn.ir.refusal import Refusal, Why
from effattn.ir.text import text
from effattn.lowering.dialects.gluon.terms import GLUON_FUNCTIONS, FastSource, GluonSource, in_gluon
from effattn.lowering.dialects.triton.terms import KEYS, ROWS, SCALAR, TILE, Lines, Value, all_symbols
from effattn.lowering.iteration.tile_ranges import tile_ranges, within_band
from effattn.lowering.kernels.parameters import Param, data_parameters, data_sizes, sizes_tested
from effattn.lowering.kernels.range_source import flatten, visits
from effattn.lowering.kernels.rendering import helpers_for, template_named, tidy
from effattn.lowering.kernels.score_facts import linear_scale, may_overflow
from effattn.lowering.kernels.source import LOG2_E, heads_together
from effattn.lowering.kernels.spec import DTYPES, KernelSpec, Tiles

WIDEST = 256  # head_dim
NARROWEST = 64  # padded head_dim
# (consumer warpgroups, programs that share a multiprocessor) -> registers per thread (when the program starts, of the
# other consumers, of the producer)
REGISTERS = {(2, 1): (168, 240, 24), (3, 1): (128, 160, 32), (2, 2): (80, 104, 24)}


@dataclass(frozen=True)
class Scores:
    """What happens to the raw scores of a tile, as source."""

    lines: list[str]  # needed by the others
    score: str  # empty: the raw score
    keep: str  # empty: every pair is kept
    keys: bool  # whether the key positions of the tile are needed
    numbers: bool  # and as floats
    masked: bool  # whether keys may be out of bounds


@dataclass(frozen=True)
class Place:
    """Where a program's tiles are: lines that define ``visited`` and ``partial_visited``, and lines in the loop."""

    before: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)  # set ``key_tile`` from the counter ``i``


MOST_KEYS = 1 << 23  # longer calls go to the Triton dialect
POSITION = Interval(0, MOST_KEYS)
SHARED_MEMORY = 226 << 10  # bytes for tiles; barriers take the rest
OWN = ("query", "key", "value", "out", "works", "together")  # parameters that are not handed to every partition
LAYOUT = "element_bitwidth=16, rank=4, transposed=False, fp4_padded=False, cga_layout=[]"
LIST_SIZES = (
    "list_batch",
    "list_heads",
    "count_batch",
    "count_heads",
    "partial_batch",
    "partial_heads",
    "row_blocks",
    "width",
)


def why_not_tensors(spec: KernelSpec, widest: int) -> Refusal | None:
    """Why tiles of a specialisation are not copied and multiplied by warpgroups; None if they are."""
    if spec.dtype not in ("bfloat16", "float16"):
        return Refusal(Why.DTYPE, f"warpgroups multiply 16-bit tensors, not {spec.dtype}")
    widths = (spec.block_d, spec.block_dv)
    if spec.head_dim % 8 or spec.value_dim % 8 or max(widths) > widest or min(widths) < NARROWEST:
        return Refusal(Why.HEAD_DIM, f"tiles are copied for head dimensions from 40 to {widest} that 8 divides")
    if spec.wide:
        return Refusal(Why.EXPRESSION, "lengths or scalars need 64 bits")
    if spec.attention.dropout:
        return Refusal(Why.DROPOUT, "the Triton dialect draws what dropout keeps")
    return None


def why_not(spec: KernelSpec) -> Refusal | None:
    """Why there is no Gluon kernel for a forward; None if there is one."""
    if (refusal := why_not_tensors(spec, WIDEST)) is not None:
        return refusal
    if spec.kind == "listed":
        tiles = spec.tiles
        if spec.list_block % tiles.block_m or (spec.list_unit % tiles.block_n and units_of(spec) == 1):
            return Refusal(Why.EXPRESSION, "the blocks of the list are smaller than tiles")
        return None
    ranges = tile_ranges(spec.attention.rule)
    if spec.kind != "prefill" or ranges.residual != sympy.true or ranges.powers is not None:
        return Refusal(Why.EXPRESSION, "the tiles to visit need a list")
    return None


def units_of(spec: KernelSpec) -> int:
    """How many units of a list make up a tile of keys; 1: a tile lies within a unit.

    A row of a tile has to be one row of the swizzling pattern, so that units beside each other are a tile.
    """
    unit, tile = spec.list_unit, spec.tiles.block_n
    gathered = 16 <= unit < tile and tile % unit == 0 and spec.block_d == spec.block_dv == 64
    return tile // unit if gathered else 1


def tile_param(spec: KernelSpec, name: str, rows: int, width: int) -> Param:
    """A descriptor of tiles of ``rows`` x ``width``."""
    layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle(width)}, {LAYOUT})"
    return Param(name, f"tensordesc<{DTYPES[spec.dtype]}[1, 1, {rows}, {width}],{layout}>", False)


def parameters(spec: KernelSpec) -> list[Param]:
    """The parameters of ``forward``, in order."""
    tiles = spec.tiles
    keys = tiles.block_n // units_of(spec)
    found = [tile_param(spec, "query", 64, spec.block_d), tile_param(spec, "key", keys, spec.block_d)]
    found += [tile_param(spec, "value", keys, spec.block_dv), tile_param(spec, "out", 64, spec.block_dv)]
    found.append(Param("lse", "*fp32"))
    if spec.kind == "listed":
        found += [Param(name, "*i32") for name in ("kv_indices", "kv_num_blocks", "partial_blocks")]
        found += [Param(name, "i32", False) for name in LIST_SIZES]
    found += data_parameters(spec.attention)
    found += [Param(name, "i32", False) for name in ("works", "together", "heads", "q_len", "k_len")]
    return found + data_sizes(spec.attention)


def slots(tiles: Tiles) -> int:
    """Buffers of queries: one for each consumer, up to a power of two."""
    return 1 << (tiles.consumers - 1).bit_length()


def shares_buffers(spec: KernelSpec) -> bool:
    """Whether the output leaves through the buffer of the queries, since there is no room for two."""
    tiles = spec.tiles
    keys = tiles.stages * tiles.block_n * (spec.block_d + spec.block_dv)
    queries = slots(tiles) * 64 * (spec.block_d + spec.block_dv)
    return 2 * (keys + queries) > SHARED_MEMORY and spec.block_d == spec.block_dv


def swizzle(width: int) -> int:
    """Bytes of the swizzling pattern of rows of ``width`` 16-bit elements."""
    return min(128, width * 2)


class HopperForward:
    """Fills the template of one specialisation."""

    template: ClassVar[str] = "hopper_forward.py.jinja"

    def __init__(self, spec: KernelSpec):
        self.spec = spec
        self.attention = spec.attention
        self.tile_ranges = tile_ranges(self.attention.rule)
        self.captures = {load.name: load for load in self.attention.captures}
        self.loads = expr.loads_of(self.attention.score, self.attention.rule)
        self.before = Lines()
        scale = linear_scale(self.attention.score, spec)
        # queries lie in shared memory, so the sign of a scale cannot move into them
        self.scale = float(scale) if scale is not None and scale.is_number and scale.is_positive else None
        self.algebra = GluonSource if spec.precise else FastSource

    def symbols(self, **more: Value) -> dict[str, Value]:
        tile = None if self.spec.kind == "listed" else ("first_row", self.spec.tiles.block_m)
        row_numbers, key_numbers = Value("row_numbers", ROWS, "float"), Value("key_numbers", KEYS, "float")
        indices = {
            "b": Value("batch", plain=True),
            "h": Value("head", SCALAR, plain=True),
            "q": Value("rows", ROWS, plain=True, tile=tile, bounds=POSITION, as_float=row_numbers),
            "k": Value("keys", KEYS, plain=True, bounds=POSITION, as_float=key_numbers),
            "s": Value("scores", TILE, "float"),
        }
        return all_symbols(indices | more, self.attention, False)

    def source(self) -> str:
        context = self.context()
        template = template_named(self.template)
        body = template.render(context, helpers="")
        return tidy(template.render(context, helpers=helpers_for(body, GLUON_FUNCTIONS)))

    def context(self) -> dict[str, Any]:
        spec, tiles = self.spec, self.spec.tiles
        place = self.listed(spec.list_block, spec.list_unit) if spec.kind == "listed" else self.by_formula()
        partial = self.scores(within_band(self.tile_ranges), partial=True)
        full = self.scores(self.everywhere(), partial=False)
        start, consumers, producer = REGISTERS[tiles.consumers, tiles.programs]
        params = parameters(spec)
        reads_keys = any(load.has(expr.k) for load in self.loads)
        return {
            "spec": spec,
            "tiles": tiles,
            "predicate_text": text(self.attention.rule),
            "score_text": text(self.attention.score),
            "place": place,
            "before": self.before.lines,
            "partial": partial,
            "full": full,
            # a branch within one loop is faster, unless it holds so much that registers spill
            "apart": bool(full.keep) or self.attention.rule.has(sympy.Or) or reads_keys,
            "scale": (1.0 if self.scale is None else self.scale) * LOG2_E,
            "large_scores": may_overflow(self.attention.score),
            "params": params,
            "shared": [param.name for param in params if param.name not in OWN],
            "unspecialised": [p.name for p in params if p.type in ("i32", "fp32") and not p.specialise],
            "start_registers": start,
            "worker_registers": [*[consumers] * (tiles.consumers - 1), producer],
            "listed": spec.kind == "listed",
            "tested": list(sizes_tested(self.attention).values()),
            "together": heads_together(spec),
            "units": units_of(spec),
            "bytes_of": f"{units_of(spec)} * " if units_of(spec) > 1 else "",
            "slots": slots(tiles),
            "shares_buffers": shares_buffers(spec),
        }

    def everywhere(self) -> Any:
        """The condition that is tested on full tiles, too."""
        return self.tile_ranges.residual if self.spec.kind == "listed" and self.spec.tests_data else sympy.true

    def by_formula(self) -> Place:
        needed = Lines()  # the bounds are computed by the producer, too

        def bound(term: Any, row: str) -> str:
            return fold(term, self.algebra(self.symbols(q=Value(row)), self.captures, needed)).text

        found = visits(self.tile_ranges, bound, False, True)
        parts = (*found.partial, *found.full)
        before, steps, count = flatten(parts, "i")
        partial = sum_of(found.partial)
        lines = [*needed.lines, *found.lines, *before, f"visited = {count}", f"partial_visited = {partial}"]
        return Place([in_gluon(line) for line in lines], [in_gluon(line) for line in steps])

    def listed(self, block: int, unit: int) -> Place:
        """Tiles from the list of each ``block`` queries, whose units have ``unit`` keys."""
        row_block = f"row_block = tile_row // {block}"
        units = units_of(self.spec)
        if units > 1:
            return Place([row_block, *gathered(units)])
        ratio = unit // self.spec.tiles.block_n
        place = "i" if ratio == 1 else f"i // {ratio}"
        more = "" if ratio == 1 else f" * {ratio} + i % {ratio}"
        times = "" if ratio == 1 else f" * {ratio}"
        found = [row_block, *list_of("kv_indices", "kv_num_blocks", "head", "row_block", times)]
        return Place(found, [f"key_tile = gl.load(listed + {place}){more}"])

    def scores(self, condition: Any, partial: bool) -> Scores:
        inside = self.before.inner()
        algebra = self.algebra(self.symbols(), self.captures, self.before, inside, key_mask="key_ok" if partial else "")
        score = "" if self.scale is not None else fold(self.attention.score, algebra).spread(TILE)
        kept = "" if condition == sympy.true else fold(condition, algebra).spread(TILE)
        used = " ".join([*inside.lines, score, kept])
        return Scores(inside.lines, score, kept, partial or "keys" in used, "key_numbers" in used, partial)


def list_of(indices: str, counts: str, head: str, block: str, times: str) -> list[str]:
    """Lines that find the list of a block: ``listed``, and how many of its tiles are visited, and partial."""

    def item(table: str) -> str:
        return f"item = (batch * {table}_batch + {head} // {table}_heads).to(gl.int64) * row_blocks + {block}"

    return [
        item("list"),
        f"listed = {indices} + item * width",
        item("count"),
        f"visited = gl.load({counts} + item){times}",
        item("partial"),
        f"partial_visited = gl.minimum(gl.load(partial_blocks + item){times}, visited)",
    ]


def gathered(units: int) -> list[str]:
    """The same for tiles of so many units. Where the length of a list is no multiple, the first tile has less."""
    return [
        *list_of("kv_indices", "kv_num_blocks", "head", "row_block", ""),
        f"missing = gl.where(visited > 0, ({units} - visited % {units}) % {units}, {units})",
        f"visited = (visited + missing) // {units}",
        f"partial_visited = gl.minimum((partial_visited + missing + {units - 1}) // {units}, visited)",
    ]


def sum_of(parts) -> str:
    return " + ".join(f"({part.end} - {part.first})" for part in parts) or "0"

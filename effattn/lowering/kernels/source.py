"""From a kernel's specialisation to its source: a pure function that takes milliseconds and no device.

The templates beside this file hold the kernels. They are filled with expressions and tile ranges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.fold import fold
from effattn.ir.text import text
from effattn.lowering.dialects.triton.terms import (
    LONGEST,
    ROWS,
    SCALAR,
    TILE,
    Lines,
    Source,
    Value,
    all_symbols,
)
from effattn.lowering.iteration.tile_ranges import TileRanges, key_conditions, tile_ranges
from effattn.lowering.kernels import allowed_keys as allowed
from effattn.lowering.kernels.parameters import (
    kernel_constants,
    key_condition,
    parameters,
    sizes_tested,
)
from effattn.lowering.kernels.range_source import Part, Ranges, flatten, position_offset, visits
from effattn.lowering.kernels.rendering import helpers_for, template_named, tidy
from effattn.lowering.kernels.score_facts import linear_scale
from effattn.lowering.kernels.spec import KernelSpec

LOG2_E = 1.4426950408889634
CACHED_KEYS = 20 << 20  # bytes of L2 cache for the keys and values of heads that run side by side


def heads_together(spec: KernelSpec) -> str:
    """How many heads run side by side, as source in the launcher."""
    if spec.tiles.heads_together:
        return str(spec.tiles.heads_together)
    width = (spec.head_dim + spec.value_dim) * (4 if spec.dtype == "float32" else 2)
    return f"{spec.groups} * max(1, {CACHED_KEYS} // ({width} * max(1, key.shape[2])))"


@dataclass
class Sweep:
    """One loop over key tiles, as the template needs it."""

    title: str
    partial: bool  # positions are masked
    count: str
    before: list[str]
    steps: list[str]
    lines: list[str] = field(default_factory=list)
    keep: str = ""
    score: str = ""
    slope: str = ""  # derivative of the score
    captured: list[str] = field(default_factory=list)  # statements that reduce gradients of captured tensors
    guard: bool = False  # a query may not have met a key yet
    reads_keys: bool = False
    stages: int = 0
    gathered: bool = False  # the keys of a tile are not consecutive; ``steps`` compute them


class Generator:
    """Fills the template of one specialisation."""

    @property
    def template(self) -> str:
        return self.spec.kind

    def __init__(self, spec: KernelSpec):
        self.spec = spec
        self.attention = spec.attention
        self.tile_ranges: TileRanges = tile_ranges(self.attention.rule)
        self.key_condition = key_condition(spec)
        self.allowed = self.key_condition != sympy.true
        self.residual = key_conditions(self.tile_ranges.residual)[1] if self.allowed else self.tile_ranges.residual
        self.captures = {load.name: load for load in self.attention.captures}
        self.early = Lines()  # before the queries of the tile are known: scalars only
        self.before = self.early.inner()  # before the loops
        self.scale = linear_scale(self.attention.score, spec)
        self.shift = ""
        self.offset = None
        if self.tile_ranges.powers is not None:
            rows = spec.tiles.block_m if spec.kind != "decode" else 1  # decode kernels with a list take one query
            self.offset = position_offset(self.tile_ranges.powers, rows, spec.tiles.block_n)

    @property
    def may_mask(self) -> bool:
        """Whether a score may itself be -inf: by an added captured tensor, or as a logarithm."""
        return self.scale is None and (bool(expr.loads_of(self.attention.score)) or self.attention.score.has(sympy.log))

    def symbols(self, **more: Value) -> dict[str, Value]:
        head = Value("head", ROWS if self.spec.kind == "decode" else SCALAR, plain=True)
        aligned = self.spec.kind in ("prefill", "listed", "backward") and not self.shift
        tile = ("first_row", self.spec.tiles.block_m) if aligned else None
        indices = {
            "b": Value("batch", plain=True),
            "h": head,
            "q": Value("rows", ROWS, plain=True, tile=tile),
            "k": Value("keys", frozenset("k"), plain=True),
            "s": Value("scores", TILE, "float"),
        }
        return all_symbols(indices | more, self.attention, self.spec.wide)

    def scalar_text(self, term: Any, lines: Lines, row: str | None = None, longest: int = LONGEST) -> str:
        """Source of a term that is a scalar for the tile, with q replaced by the query named ``row``."""
        symbols = self.symbols(**({"q": Value(row)} if row else {}))
        return fold(term, Source(symbols, self.captures, lines, longest=longest)).text

    def source(self) -> str:
        context = self.context()
        template = template_named(f"{self.template}.py.jinja")
        body = template.render(context, helpers="")
        return tidy(template.render(context, helpers=helpers_for(body)))

    def context(self) -> dict[str, Any]:
        """Variables of the templates."""
        spec, tiles = self.spec, self.spec.tiles
        self.align()
        ranges = self.ranges()
        sweeps = self.sweeps(ranges)
        scale_constant = float(self.scale) if self.scale is not None and self.scale.is_number else None
        scale_expression = ""
        if self.scale is not None and scale_constant is None:
            scale_expression = self.scalar_text(self.scale, self.before)
        params = parameters(spec)
        return {
            "form": self.spec.form,
            "predicate_text": text(self.attention.rule),
            "score_text": text(self.attention.score),
            "dtype": spec.dtype,
            "head_dim": spec.head_dim,
            "value_dim": spec.value_dim,
            "block_dv": spec.block_dv,
            "groups": spec.groups,
            "tiles": tiles,
            "block_m": tiles.block_m,
            "block_n": tiles.block_n,
            "warps": tiles.warps,
            "stages": tiles.stages,
            "together": heads_together(spec),
            "empty_rows": self.attention.empty_rows,
            "empty_output": self.attention.empty_output,
            "constants": {name: value for name, value in kernel_constants(spec).items() if name != "DIRECT"},
            "params": params,
            "unspecialised": [p.name for p in params if p.type in ("i32", "i64", "fp32") and not p.specialise],
            "pad_d": spec.block_d != spec.head_dim,
            "pad_dv": spec.block_dv != spec.value_dim,
            "precision": self.precision(),
            "shifted": bool(self.shift),
            "shift": self.shift,
            "shift_lines": self.early.lines,
            "before": self.before.lines,
            "range_lines": list(ranges.lines),
            "sweeps": sweeps,
            "scale_constant": scale_constant,
            "scale_base2": None if scale_constant is None else abs(scale_constant) * LOG2_E,
            "scale_expression": scale_expression,
            "score_expression": self.scale is None,
            "tested": list(sizes_tested(spec.attention).values()),
            "dropout": self.attention.dropout,
            "least_kept": self.attention.least_kept << 16,
            "kept_scale": self.attention.kept_scale,
            "listed": spec.kind == "listed",
            "gathered": False,
            **self.allowed_context(),
        }

    def allowed_context(self) -> dict[str, Any]:
        """Variables of the kernel ``find_allowed``."""
        if not self.allowed:
            return {"allowed": False}
        head = {"h": Value("0"), "q": Value("0")}  # neither occurs
        lines, keep = allowed.lines_and_keep(self.key_condition, self.symbols(**head), self.captures)
        params = parameters(self.spec, "find_allowed")
        return {
            "allowed": True,
            "allowed_params": params,
            "allowed_unspecialised": [p.name for p in params if not p.specialise],
            "allowed_lines": lines,
            "allowed_keep": keep,
            "allowed_parts": allowed.PARTS,
            "allowed_keys": allowed.KEYS_AT_ONCE,
        }

    def precision(self) -> str:
        if self.spec.dtype != "float32":
            return ""
        return f', input_precision="{"tf32" if self.spec.tf32 else "ieee"}"'

    def align(self) -> None:
        """Shift tiles so that the queries of each lie within one block of absolute positions."""
        if self.offset is None or self.spec.kind == "decode":
            return
        if self.offset.is_Integer:
            here = int(self.offset) % self.spec.tiles.block_m
            self.shift = str(here) if here else ""
            return
        offset = self.scalar_text(self.offset, self.early)
        self.shift = f"(({offset}) & (BLOCK_M - 1)).to(tl.int32)"

    def ranges(self) -> Ranges:
        listed = self.offset is not None
        split = self.spec.kind != "decode"
        found = visits(
            self.tile_ranges, lambda bound, row: self.scalar_text(bound, self.before, row), listed, split, self.allowed
        )
        lines = [*(allowed.SUMS if self.allowed else ()), *found.lines]
        if listed and self.tile_ranges.choice:
            powers = self.tile_ranges.powers
            assert powers is not None
            block = self.scalar_text(expr.FloorDiv(powers.position, powers.block), self.before, "first_row")
            lines.insert(0, f"position_block = {block}")
        return Ranges(tuple(lines), found.full, found.partial)

    def sweeps(self, ranges: Ranges) -> list[Sweep]:
        spec = self.spec
        found = []
        if spec.kind == "decode":
            found.append(self.sweep("", ranges.partial, partial=True))
        else:
            title = "tiles in which every row keeps every key"
            if self.residual != sympy.true:
                title = "tiles in which only conditions on data are tested"
            if ranges.full:
                found.append(self.sweep(title, ranges.full, partial=False))
            found.append(self.sweep("partial tiles: every condition is tested", ranges.partial, partial=True))
            found[-1].stages = spec.tiles.partial_stages
        return found

    def algebra(self, before: Lines, inside: Lines, **more: Any) -> Source:
        """The algebra of a loop body."""
        return Source(self.symbols(), self.captures, before, inside, **more)

    def differentiate(self, sweep: Sweep, algebra: Source) -> None:
        """Add what gradients need to a loop; the forward needs nothing."""

    def sweep(self, title: str, parts: tuple[Part, ...], partial: bool) -> Sweep:
        return self.sweep_over(title, flatten(parts, "i"), partial)

    def sweep_over(self, title: str, loop: tuple[list[str], list[str], str], partial: bool) -> Sweep:
        """``loop``: lines before it, lines in it that set the tile number from ``i``, the trip count."""
        before, steps, count = loop
        inside = self.before.inner()
        algebra = self.algebra(self.before, inside, key_mask="key_ok" if partial else "")
        sweep = Sweep(title, partial, count, before, steps, lines=inside.lines)
        if self.scale is None:
            sweep.score = fold(self.attention.score, algebra).spread(TILE)
        self.differentiate(sweep, algebra)
        condition = self.attention.rule if partial else self.residual
        keep = [] if condition == sympy.true else [fold(condition, algebra)]
        if partial:
            keep.append(Value("key_ok", frozenset("k"), "bool"))
        if keep:
            whole = reduce(lambda x, y: algebra.call("and", x, y), keep)
            sweep.keep = whole.spread(TILE)
        sweep.guard = bool(keep) or self.may_mask
        used = " ".join([*inside.lines, sweep.score, sweep.keep])
        sweep.reads_keys = re.search(r"\bkeys\b", used) is not None
        return sweep

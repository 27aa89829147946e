"""Source of a selector's scores: products of strided vectors, a masked softmax, reduced to blocks and units.

There are two kernels. ``row_totals`` computes each query's normaliser; ``cells`` computes the products again and
reduces them, which is cheaper than storing them and needs no N x N memory. Both split the keys, so that few queries
still fill a GPU, and test the mask only on partial tiles.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.fold import fold
from effattn.ir.text import text
from effattn.lowering.dialects.triton.terms import KEYS, ROWS, SCALAR, TILE, Lines, Source, Value, all_symbols
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.lowering.kernels.parameters import Param, data_parameters, data_sizes, sizes_tested
from effattn.lowering.kernels.rendering import helpers_for, template_named, tidy
from effattn.lowering.kernels.source import LOG2_E
from effattn.lowering.kernels.spec import DTYPES, padded

LN_2 = 0.6931471805599453
TILE_SIDE = {16: 128, 32: 64}  # by bits of the dtype


@dataclass(frozen=True)
class ScoreSpec:
    """One specialisation of the score kernels."""

    form: str  # shown in the file
    attention: AttentionSpec
    dtype: str
    head_dim: int
    groups: int  # lists that share one key head
    q_stride: int  # distance between query vectors
    k_stride: int
    height: int  # query vectors per block
    width: int  # key vectors per unit
    rows: Literal["max", "mean"]
    columns: Literal["max", "sum"]
    splits: int  # parts of the keys in ``row_totals``; a power of two
    stages: int = 2
    tf32: bool = False
    wide: bool = False  # as in KernelSpec

    @property
    def bits(self) -> int:
        return 32 if self.dtype == "float32" else 16

    @property
    def block_m(self) -> int:
        return TILE_SIDE[self.bits]

    @property
    def block_n(self) -> int:
        return TILE_SIDE[self.bits]

    @property
    def block_d(self) -> int:
        return padded(self.head_dim)

    @property
    def warps(self) -> int:
        return 8 if self.block_m * self.block_n > 64 * 64 else 4

    def constants(self) -> dict[str, int]:
        """The compile-time constants of both kernels."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "GROUPS": self.groups,
            "Q_STRIDE": self.q_stride,
            "K_STRIDE": self.k_stride,
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "BLOCKS": max(self.block_m // self.height, 1),
            "UNITS": max(self.block_n // self.width, 1),
            "HIGH_TURNS": max(self.height // self.block_m, 1),
            "WIDE_TURNS": max(self.width // self.block_n, 1),
            "SPLITS": self.splits,
        }


def parameters(spec: ScoreSpec, kernel: str) -> list[Param]:
    """The parameters of ``row_totals`` or ``cells``, in order."""
    element = f"*{DTYPES[spec.dtype]}"
    found = [Param("query", element), Param("key", element), Param("totals", "*fp32")]
    found += [Param("out", "*fp32")] if kernel == "cells" else []
    found += data_parameters(spec.attention)
    found += [Param(f"{name}_stride_{dim}", "i32") for name in ("query", "key") for dim in "bhnd"]
    sizes = ("lists", "vectors", "key_vectors", "row_blocks", "key_units", "splits", "row_start")
    found += [Param(name, "i32", False) for name in sizes]
    found += [Param("divisor", "fp32", False)] + [Param(name, "i32", False) for name in ("q_len", "k_len")]
    return found + data_sizes(spec.attention) + [Param(name, "constexpr") for name in spec.constants()]


def constant_scale(score: Any) -> float | None:
    """c if the score is ``c * s`` with a number c > 0, which folds into the exponent; else None."""
    factor = score / expr.s
    return float(factor) if factor.is_number and factor > 0 else None


@dataclass(frozen=True)
class Sweep:
    """One loop over key tiles, as the template needs it."""

    title: str
    range: str
    partial: bool
    lines: list[str]
    score: str  # "": the unscaled products
    keep: str  # "": all keys are kept
    reads_keys: bool


def _sweep(
    attention: AttentionSpec, symbols: dict[str, Value], captures: Any, before: Lines, scored: bool, partial: bool
) -> Sweep:
    inside = before.inner()
    algebra = Source(symbols, captures, before, inside, key_mask="key_ok" if partial else "")
    score = fold(attention.score, algebra).spread(TILE) if scored else ""
    condition = attention.predicate if partial else tile_ranges(attention.predicate).residual
    keep = [] if condition == sympy.true else [fold(condition, algebra)]
    keep += [Value("key_ok", KEYS, "bool")] if partial else []
    kept = reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE) if keep else ""
    title = "every row sees every key" + ("" if partial or not keep else ", but for conditions on data")
    return Sweep(
        "some rows do not see some keys" if partial else title,
        "full, end" if partial else "start, full",
        partial,
        inside.lines,
        score,
        kept,
        reads_keys=re.search(r"\bkeys\b", " ".join([*inside.lines, score, kept])) is not None,
    )


def generate(spec: ScoreSpec) -> str:
    """The source of both kernels and ``launch``.

    Raises:
        UnknownOperation: kernels cannot compute an operation of the score or predicate.
    """
    captures = {load.name: load for load in spec.attention.captures}
    before, bound_lines = Lines(), Lines()
    indices = {
        "b": Value("batch", plain=True),
        "h": Value("head", plain=True),
        "q": Value("rows", ROWS, plain=True),
        "k": Value("keys", KEYS, plain=True),
        "s": Value("scores", TILE, "float"),
    }
    symbols = all_symbols(indices, spec.attention, spec.wide)
    scale = constant_scale(spec.attention.score)
    sweeps = [_sweep(spec.attention, symbols, captures, before, scale is None, partial) for partial in (False, True)]
    (upper,) = tile_ranges(spec.attention.predicate).upper
    one_row = replace(symbols["q"], axes=SCALAR, plain=False)
    first_bound, last_bound = (
        fold(upper, Source({**symbols, "q": replace(one_row, text=row)}, captures, bound_lines)).text
        for row in ("first_row", "last_row")
    )
    template = template_named("score.py.jinja")
    params, constants = parameters(spec, "cells"), spec.constants()
    context: dict[str, Any] = {
        "form": spec.form,
        "predicate_text": text(spec.attention.predicate),
        "score_text": text(spec.attention.score),
        "dtype": spec.dtype,
        "head_dim": spec.head_dim,
        "q_stride": spec.q_stride,
        "k_stride": spec.k_stride,
        "rows_reduced": spec.rows,
        "columns_reduced": spec.columns,
        "height": spec.height,
        "width": spec.width,
        "block_m": spec.block_m,
        "block_n": spec.block_n,
        "warps": spec.warps,
        "stages": spec.stages,
        "splits": spec.splits,
        "constants": constants,
        "pad_d": spec.head_dim != spec.block_d,
        "precision": f', input_precision="{"tf32" if spec.tf32 else "ieee"}"' if spec.dtype == "float32" else "",
        "sweeps": sweeps,
        "scale": repr(LOG2_E * (1.0 if scale is None else scale)),
        "ln2": LN_2,
        "nothing": 'float("-inf")' if spec.columns == "max" else "0.0",
        "high_turns": constants["HIGH_TURNS"],
        "wide_turns": constants["WIDE_TURNS"],
        "first_bound": first_bound,
        "last_bound": last_bound,
        "bound_lines": bound_lines.lines,
        "before": before.lines,
        "params_totals": parameters(spec, "row_totals"),
        "params_cells": params,
        "unspecialised": [p.name for p in params if p.type in ("i32", "fp32") and not p.specialise],
        "tested": list(sizes_tested(spec.attention).values()),
    }
    body = template.render(context, helpers="")
    return tidy(template.render(context, helpers=helpers_for(body)))

"""The source of a selector's scores: products of strided vectors, a masked softmax, reduced to blocks and units.

Two kernels a file. ``row_totals`` finds each row's normaliser, split over the keys so that a few rows still fill a GPU;
``cells`` computes the products again and reduces them: cheaper than to keep them, and nothing is as large as N x N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import sympy

from effattn.ir.fold import fold
from effattn.ir.plan import Plan
from effattn.ir.text import text
from effattn.lowering.tiles import walk
from effattn.lowering.triton.algebra import KEYS, ROWS, TILE, Lines, Source, Value
from effattn.lowering.triton.source import (
    Param,
    data_parameters,
    data_sizes,
    helpers_for,
    sizes_tested,
    template_named,
    tidy,
)
from effattn.lowering.triton.spec import DTYPES, padded

WIDEST_TILE = 128


@dataclass(frozen=True)
class ScoreSpec:
    """One specialisation of the score kernels."""

    plan: Plan  # its predicate and score; see :func:`canonical`
    dtype: str
    head_dim: int
    groups: int  # lists that share one key head
    q_stride: int  # rows from one vector to the next
    k_stride: int
    height: int  # query vectors of a block
    width: int  # key vectors of a unit
    rows: Literal["max", "mean"]
    columns: Literal["max", "sum"]
    splits: int  # parts of the keys in ``row_totals``; a power of two
    stages: int = 2
    tf32: bool = False

    @property
    def block_m(self) -> int:
        return min(max(64, self.height), WIDEST_TILE)

    @property
    def block_n(self) -> int:
        return min(max(64, self.width), WIDEST_TILE)

    @property
    def block_d(self) -> int:
        return padded(self.head_dim)

    @property
    def warps(self) -> int:
        return 8 if self.block_m * self.block_n > 64 * 128 else 4

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
    found += data_parameters(spec.plan)
    found += [Param(f"{name}_stride_{dim}", "i32") for name in ("query", "key") for dim in "bhnd"]
    sizes = ("lists", "vectors", "key_vectors", "row_blocks", "key_units", "splits", "row_start")
    found += [Param(name, "i32", False) for name in sizes]
    found += [Param("divisor", "fp32", False)] + [Param(name, "i32", False) for name in ("q_len", "k_len")]
    return found + data_sizes(spec.plan) + [Param(name, "constexpr") for name in spec.constants()]


def generate(spec: ScoreSpec) -> str:
    """The source of both kernels, with ``launch``.

    Raises:
        UnknownOperation: the score or predicate holds an operation that kernels do not have.
    """
    loads = {load.name: load for load in spec.plan.loads}
    before, inside, bound_lines = Lines(), Lines(), Lines()
    inside.taken = before.taken
    symbols = {
        "b": Value("batch", plain=True),
        "h": Value("head", plain=True),
        "Nq": Value("q_len"),
        "Nk": Value("k_len"),
        "q": Value("rows", ROWS, plain=True),
        "k": Value("keys", KEYS, plain=True),
        "s": Value("scores", TILE, "float"),
    }
    symbols |= {name: Value(f"scalar_{name}") for name in spec.plan.scalars}
    symbols |= {name: Value(f"number_{name}", kind="float") for name in spec.plan.numbers}
    algebra = Source(symbols, loads, before, inside, key_mask="key_ok")
    score = fold(spec.plan.score, algebra).spread(TILE)
    keep = [Value("key_ok", KEYS, "bool"), Value("row_ok", ROWS, "bool")]
    if spec.plan.predicate != sympy.true:
        keep.append(fold(spec.plan.predicate, algebra))
    (upper,) = walk(spec.plan.predicate).upper
    last = Source({**symbols, "q": Value("last_row")}, loads, bound_lines)
    template = template_named("score.py.jinja")
    params = parameters(spec, "cells")
    context: dict[str, Any] = {
        "form": spec.plan.form,
        "predicate_text": text(spec.plan.predicate),
        "score_text": text(spec.plan.score),
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
        "constants": spec.constants(),
        "pad_d": spec.head_dim != spec.block_d,
        "precision": f', input_precision="{"tf32" if spec.tf32 else "ieee"}"' if spec.dtype == "float32" else "",
        "keep": reduce(lambda x, y: algebra.call("and", x, y), keep).spread(TILE),
        "score": score,
        "start": 'float("-inf")' if spec.columns == "max" else "0.0",
        "bound": fold(upper, last).text,
        "bound_lines": bound_lines.lines,
        "before": before.lines,
        "inside": inside.lines,
        "params_totals": parameters(spec, "row_totals"),
        "params_cells": params,
        "unspecialised": [p.name for p in params if p.type in ("i32", "fp32") and not p.specialise],
        "tested": list(sizes_tested(spec.plan).values()),
    }
    context["host_helpers"] = template_named("host.jinja").render({**context, "descriptors": False})
    body = template.render(context, helpers="")
    return tidy(template.render(context, helpers=helpers_for(body)))

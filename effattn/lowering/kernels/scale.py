"""What kernels can use of a score: that it is a multiple of ``s``, and how large it may be."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, around, interval
from effattn.lowering.dialects.triton.terms import NARROW
from effattn.lowering.kernels.spec import KernelSpec

LARGE_LSE = 1024.0  # beyond it float32 keeps fewer than 14 bits of the logarithm of a sum


def linear_scale(score: Any, spec: KernelSpec) -> Any | None:
    """c if the score is ``c * s`` with one c per tile, so that it folds into the exponent; else None."""
    factor = sympy.expand(score).coeff(expr.s, 1)
    one_head = spec.kind in ("prefill", "listed")  # per tile
    varying = (expr.s, expr.q, expr.k) if one_head else (expr.s, expr.q, expr.k, expr.h)
    if factor.has(*varying) or (factor.is_zero is not False and factor.is_number):
        return None
    return factor if sympy.expand(score - factor * expr.s) == 0 else None


def affine_slope(score: Any) -> Any | None:
    """c if the score is ``c * s + bias`` with one c per tile, not zero, and a bias without s; else None."""
    whole = sympy.expand(score)
    slope = whole.coeff(expr.s, 1)
    if slope.has(expr.s, expr.q, expr.k) or slope == 0 or sympy.expand(whole - slope * expr.s).has(expr.s):
        return None
    return slope


@lru_cache(maxsize=1024)
def loses_totals(score: Any) -> bool:
    """Whether a row's LSE may be so large that float32 does not keep how many keys share its greatest score.

    As in a row of nothing but the lowest float, whose weights are one over their number.
    """
    slope = affine_slope(score)
    if slope is not None and sympy.expand(score - slope * expr.s) == 0:
        return False

    def size(name: str) -> Interval:
        return around(1.0) if name == expr.s.name else NARROW

    return not interval(score, size, lambda name: UNKNOWN).within(around(LARGE_LSE))

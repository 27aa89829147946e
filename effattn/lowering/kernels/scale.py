"""Scores that are a multiple of ``s``, as kernels can use it."""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.lowering.kernels.spec import KernelSpec


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

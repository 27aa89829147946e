"""The derivative of a score expression with respect to the raw score s or a captured tensor, as an expression."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Load, Where


@dataclass(frozen=True)
class Reads:
    """One load of a captured tensor in a score, and the derivative of the score with respect to it."""

    load: Load
    slope: Any


def reads_of(score: Any, name: str) -> tuple[Reads, ...]:
    """Where a score depends on a captured tensor so that it has a gradient."""
    loads = (load for load in expr.loads_of(score) if load.name == name)
    found = (Reads(load, derivative(score, load)) for load in loads)
    return tuple(read for read in found if read.slope != 0)


@lru_cache(maxsize=1024)
def derivative(score: Any, by: Any = expr.s) -> Any:
    """d score / d ``by``, which is ``s`` or a load.

    At a tie of Min or Max, the first argument in sympy's order gets the whole gradient. Indices of loads and conditions
    have none.
    """
    term = sympy.sympify(score)
    if term == by:
        return sympy.Integer(1)
    if not term.has(by) or term.is_integer or isinstance(term, Load):
        return sympy.Integer(0)
    if isinstance(term, Where):
        condition, x, y = term.args
        return Where(condition, derivative(x, by), derivative(y, by))
    if isinstance(term, (sympy.Min, sympy.Max)):
        return _of_extreme(term, by)
    # the chain rule by hand, because sympy's diff does not handle boolean conditions
    names = [sympy.Dummy(real=True) for _ in term.args]
    outer = term.func(*names)
    inner = dict(zip(names, term.args, strict=True))
    return sympy.Add(
        *(outer.diff(name).xreplace(inner) * derivative(arg, by) for name, arg in inner.items() if arg.has(by))
    )


def _of_extreme(term: Any, by: Any) -> Any:
    first, *others = term.args
    rest = term.func(*others)
    wins = first >= rest if isinstance(term, sympy.Max) else first <= rest
    return Where(wins, derivative(first, by), derivative(rest, by))


@lru_cache(maxsize=1024)
def affine_slope(score: Any) -> Any | None:
    """c if the score is ``c * s + bias`` with one c per head, not zero, and a bias without s; else None."""
    whole = sympy.expand(score)
    slope = whole.coeff(expr.s, 1)
    if slope.has(expr.s, expr.q, expr.k) or slope == 0 or sympy.expand(whole - slope * expr.s).has(expr.s):
        return None
    return slope

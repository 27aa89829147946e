"""The derivative of a score expression with respect to the raw score s, as an expression."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Where


@lru_cache(maxsize=1024)
def derivative(score: Any) -> Any:
    """d score / d s. At a tie of Min or Max, the first argument in sympy's order gets the whole gradient."""
    term = sympy.sympify(score)
    if not term.has(expr.s) or isinstance(term, sympy.sign):
        return sympy.Integer(0)
    if term == expr.s:
        return sympy.Integer(1)
    if isinstance(term, Where):
        condition, x, y = term.args
        return Where(condition, derivative(x), derivative(y))
    if isinstance(term, (sympy.Min, sympy.Max)):
        return _of_extreme(term)
    # the chain rule by hand, because sympy's diff does not handle boolean conditions
    names = [sympy.Dummy(real=True) for _ in term.args]
    outer = term.func(*names)
    inner = dict(zip(names, term.args, strict=True))
    return sympy.Add(
        *(outer.diff(name).xreplace(inner) * derivative(arg) for name, arg in inner.items() if arg.has(expr.s))
    )


def _of_extreme(term: Any) -> Any:
    first, *others = term.args
    rest = term.func(*others)
    wins = first >= rest if isinstance(term, sympy.Max) else first <= rest
    return Where(wins, derivative(first), derivative(rest))

"""The derivative of a score expression with respect to the raw score s or a captured tensor, as an expression."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Load, Where


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

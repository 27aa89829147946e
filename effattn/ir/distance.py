"""Terms that depend on query and key by their distance alone."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr

DISTANCE = sympy.Symbol("q - k", integer=True)


@lru_cache(maxsize=1024)
def of_distance(term: Any) -> Any | None:
    """The term with ``DISTANCE`` instead of ``q`` and ``k``; None if it depends on them in another way."""
    whole = sympy.sympify(term).replace(_compares_integers, lambda given: given.func(given.lhs - given.rhs, 0))
    found = whole.xreplace({expr.k: expr.q - DISTANCE})
    return None if found.has(expr.q, expr.k) else found


def _compares_integers(term: Any) -> bool:
    return isinstance(term, sympy.core.relational.Relational) and bool(term.lhs.is_integer and term.rhs.is_integer)

"""Elements that are read at a number are read at the index that is this number there: ``where(h == 0, x[0], x[h])``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sympy

from effattn.ir import expr


def at_one_place(term: Any, names: Collection[str]) -> Any:
    """``term`` with all loads of a name at one place, as far as the choices that they stand in tell that they are.

    A write to one head of the scores reads that head, and the scores are the product of query and key all the same.
    """
    for name in names:
        places = [load for load in expr.loads_of(term) if load.name == name]
        if len(places) > 1:
            general = min(places, key=lambda load: sum(index.is_Integer for index in map(sympy.sympify, load.indices)))
            term = _replaced(term, general, {})
    return term


def _replaced(term: Any, general: expr.Load, known: Mapping[Any, Any]) -> Any:
    """``known``: the number that an index is where ``term`` counts."""
    if isinstance(term, expr.Load) and term.name == general.name:
        pairs = zip(term.indices, general.indices, strict=True)
        return general if all(index in (place, known.get(place)) for index, place in pairs) else term
    if not term.args or not any(load.name == general.name for load in expr.loads_of(term)):
        return term
    if isinstance(term, expr.Where):
        condition, yes, no = term.args
        equal = [part for part in expr.conjuncts(condition) if isinstance(part, sympy.Eq) and part.rhs.is_Integer]
        inside = {**known, **{part.lhs: part.rhs for part in equal}}
        return expr.Where(condition, _replaced(yes, general, inside), _replaced(no, general, known))
    return term.func(*[_replaced(arg, general, known) for arg in term.args])

"""Unifies loads at a constant index with loads at the index that equals it: ``where(h == 0, x[0], x[h])``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sympy

from effattn.ir import expr


def at_one_place(term: Any, names: Collection[str]) -> Any:
    """``term`` with all loads of a name at one index, as far as the conditions around them show that it is the same.

    A write to one head of the scores reads that head; the scores are still one product of query and key.
    """
    for name in names:
        places = [load for load in expr.loads_of(term) if load.name == name]
        if len(places) > 1:
            general = min(places, key=lambda load: sum(index.is_Integer for index in map(sympy.sympify, load.indices)))
            term = _replaced(term, general, {})
    return term


def _replaced(term: Any, general: expr.Load, known: Mapping[Any, Any]) -> Any:
    """``known``: indices with a constant value where ``term`` is evaluated."""
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

"""Positions of packed documents: within a document they go up by one, so their differences are those of indices.

transformers derives documents from positions, ``(diff(positions) != 1).cumsum(-1)``, and compares positions instead of
indices: ``positions[k] <= positions[q] & document[q] == document[k]``. Between two tokens of one document every step is
one, so this means ``k <= q & document[q] == document[k]``.
"""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import IntLoad, Load, k, q
from effattn.passes.symbolic import Reader

_COMPARISONS = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne)


def by_index(predicate: Any, reader: Reader) -> Any:
    """``predicate`` with indices for positions, where these count the tokens of a document."""
    for part in expr.conjuncts(predicate):
        if (ends := _same_document(part)) is None or (steps := _positions(reader, ends[0].name, ends[0])) is None:
            continue
        of_query, of_key = (end.indices[-1] for end in ends)
        positions = [steps.xreplace({k: index}) for index in (of_query, of_key)]
        swap = dict(zip(positions, (of_query, of_key), strict=True))
        found = {
            atom: atom.xreplace(swap) for atom in predicate.atoms(*_COMPARISONS) if _is_of_distance(atom, *positions)
        }
        predicate = predicate.xreplace(found)
    return predicate


def _same_document(part: Any) -> tuple[Load, Load] | None:
    """The elements at the query and at the key of ``document[q] == document[k]``."""
    if not isinstance(part, sympy.Eq) or not all(isinstance(side, IntLoad) and side.indices for side in part.args):
        return None
    for of_query, of_key in (part.args, part.args[::-1]):
        if of_query.args[:-1] == of_key.args[:-1] and of_query.indices[-1].has(q) and of_key.indices[-1] == k:
            return of_query, of_key
    return None


def _positions(reader: Reader, name: str, element: Load) -> Any | None:
    """``positions[k]`` where the captured tensor ``name`` is ``(diff(positions) != 1).cumsum(-1)``; else None."""
    if name not in reader.captures:
        return None
    call = reader.view.call(reader.captures[name].node)
    if call is None or call.name != "cumsum" or call.get("dim") not in (-1, len(element.indices) - 1):
        return None
    step = reader.argument(call, "input")
    if step.kind != "bool" or len(step.shape) != len(element.indices):
        return None
    condition = step.bool_at((*element.indices[:-1], k + 1))  # whether token k + 1 begins a document
    if not isinstance(condition, sympy.Ne):
        return None
    difference = sympy.expand(condition.lhs - condition.rhs)
    for position in expr.loads_of(difference):
        following = position.xreplace({k: k + 1})
        if following != position and sympy.expand(difference - (following - position - 1)) == 0:
            return position
        if following != position and sympy.expand(difference + (following - position - 1)) == 0:
            return position
    return None


def _is_of_distance(atom: Any, of_query: Any, of_key: Any) -> bool:
    """Whether a comparison reads these positions, and only their difference."""
    difference = sympy.expand(atom.lhs - atom.rhs)
    if not difference.has(of_query, of_key):
        return False
    at_query, at_key = (sympy.Dummy(integer=True) for _ in range(2))
    named = difference.xreplace({of_query: at_query, of_key: at_key})
    one, other = sympy.diff(named, at_query), sympy.diff(named, at_key)
    return one.is_Integer and one + other == 0

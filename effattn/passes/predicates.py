"""Predicates in one normal form, so that equal masks read equal whatever their spelling.

Negation stands only before what is no inequality; inequalities read ``k <= rest`` or ``rest - k < constant``; a bound
that another one implies is dropped.
"""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Where, k

_INEQUALITIES = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def simplify(predicate) -> Any:
    """The normal form of a predicate."""
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, sympy.And):
        parts = sympy.And(*[simplify(part) for part in predicate.args])
        return _without_implied(parts) if isinstance(parts, sympy.And) else parts
    if isinstance(predicate, sympy.Or):
        return sympy.Or(*[simplify(part) for part in predicate.args])
    if isinstance(predicate, sympy.Not):
        return _negated(predicate.args[0])
    if isinstance(predicate, _INEQUALITIES):
        return _oriented(predicate)
    return predicate


def _negated(inner) -> Any:
    if isinstance(inner, (sympy.And, sympy.Or)):
        dual = sympy.Or if isinstance(inner, sympy.And) else sympy.And
        return simplify(dual(*[sympy.Not(part) for part in inner.args]))
    negated = sympy.Not(inner)  # sympy turns Not of a relation into the opposite relation
    return negated if isinstance(negated, sympy.Not) else simplify(negated)


def _oriented(atom):
    """An inequality of integers as ``k <= rest`` (upper bounds) or ``rest - k < constant`` (lower bounds)."""
    difference = atom.lhs - atom.rhs if isinstance(atom, (sympy.Le, sympy.Lt)) else atom.rhs - atom.lhs
    difference = sympy.expand(difference)
    strict = isinstance(atom, (sympy.Lt, sympy.Gt))
    if difference.is_integer is not True or not difference.has(k):
        return atom
    if (distance := _distance(difference)) is not None:
        inside, sign, rest = distance
        join = sympy.And if sign == 1 else sympy.Or
        relation = sympy.Lt if strict else sympy.Le
        return simplify(join(relation(sign * inside + rest, 0), relation(-sign * inside + rest, 0)))
    key = difference.coeff(k)
    if key == 1:
        rest = k - difference  # k < rest or k <= rest
        return sympy.Le(k, rest - 1 if strict else rest)
    if key == -1:
        constant, others = difference.as_coeff_Add()
        limit = -constant if strict else 1 - constant
        return sympy.Lt(others, limit)
    return atom


def _distance(difference) -> tuple[Any, int, Any] | None:
    """``(x, sign, rest)`` of ``sign * |x| + rest`` where only x holds k: a window to both sides is two bounds."""
    holding = [part for part in sympy.Add.make_args(difference) if part.has(k)]
    if len(holding) != 1:
        return None
    factor, inside = holding[0].as_coeff_Mul()
    if not isinstance(inside, sympy.Abs) or factor not in (1, -1):
        return None
    return inside.args[0], int(factor), difference - holding[0]


def _without_implied(conjunction: sympy.And):
    """Of two bounds that differ by a constant, only the narrower."""
    kept: list[Any] = []
    for part in conjunction.args:
        slack = _slack(part)
        if slack is not None:
            rivals = [(other, _slack(other)) for other in conjunction.args if other is not part]
            differences = [sympy.expand(theirs - slack) for _, theirs in rivals if theirs is not None]
            if any(difference.is_Integer and difference > 0 for difference in differences):
                continue  # another condition has less room: it implies this one
        kept.append(part)
    return sympy.And(*kept)


def _slack(part) -> Any | None:
    """x where ``part`` is the condition x <= 0 over integers."""
    if isinstance(part, (sympy.Le, sympy.Lt)):
        slack = part.lhs - part.rhs
    elif isinstance(part, (sympy.Ge, sympy.Gt)):
        slack = part.rhs - part.lhs
    else:
        return None
    if slack.is_integer is not True:
        return None
    return slack + 1 if isinstance(part, (sympy.Lt, sympy.Gt)) else slack


def assuming(score, predicate):
    """``score`` where ``predicate`` holds: choices that the predicate has already made are gone."""
    known = set(expr.conjuncts(predicate))
    if not known or not isinstance(score, sympy.Basic) or not score.has(Where):
        return score
    swap: dict[Any, Any] = {}
    for choice in score.atoms(Where):
        condition = simplify(choice.args[0])
        if all(part in known for part in expr.conjuncts(condition)) and condition != sympy.false:
            swap[choice] = choice.args[1]
        elif simplify(sympy.Not(choice.args[0])) in known:
            swap[choice] = choice.args[2]
    return score.xreplace(swap) if swap else score

"""A normal form of predicates, so that equal masks read equal however they are written.

Negations are pushed inwards and turned into opposite inequalities. Inequalities read ``k <= rest`` or
``rest - k < constant``. A bound that another one implies is dropped.
"""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Where, k, q

_INEQUALITIES = (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)


def simplify(predicate) -> Any:
    """The normal form of a predicate."""
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, sympy.And):
        parts = sympy.And(*[simplify(part) for part in predicate.args])
        if not isinstance(parts, sympy.And):
            return parts
        return sympy.false if _contradicts_itself(parts) else _bounds(parts, narrowest=True)
    if isinstance(predicate, sympy.Or):
        parts = sympy.Or(*[simplify(part) for part in predicate.args])
        return _bounds(parts, narrowest=False) if isinstance(parts, sympy.Or) else parts
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
    loads = expr.loads_of(difference)
    if loads and not difference.xreplace(dict.fromkeys(loads, sympy.Integer(0))).has(k):
        # data may be as large as their dtype allows, so a sum that user code does not compute might wrap around
        return atom if isinstance(atom, (sympy.Le, sympy.Lt)) else atom.reversed
    if (distance := _distance(difference)) is not None:
        inside, sign, rest = distance
        join = sympy.And if sign == 1 else sympy.Or
        relation = sympy.Lt if strict else sympy.Le
        return simplify(join(relation(sign * inside + rest, 0), relation(-sign * inside + rest, 0)))
    key = difference.coeff(k)
    if key == 1:
        rest = k - difference - (1 if strict else 0)  # k <= rest
        constant, others = rest.as_coeff_Add()
        if not rest.has(q) and (others == 0 or constant == -1):
            return sympy.Lt(k, rest + 1)  # rest + 1 is a number of keys
        return sympy.Le(k, rest)
    if key == -1:
        constant, others = difference.as_coeff_Add()
        limit = -constant if strict else 1 - constant
        return sympy.Lt(others, limit)
    return _sides(difference, strict)


def _sides(difference, strict: bool):
    """``difference <= 0`` with positive terms on the left: ``k//4 <= q//4``."""
    left = sympy.Add(*[part for part in sympy.Add.make_args(difference) if part.as_coeff_Mul()[0].is_positive])
    return (sympy.Lt if strict else sympy.Le)(left, left - difference)


def _distance(difference) -> tuple[Any, int, Any] | None:
    """``(x, sign, rest)`` of ``sign * |x| + rest`` where only x contains k (a two-sided window is two bounds)."""
    holding = [part for part in sympy.Add.make_args(difference) if part.has(k)]
    if len(holding) != 1:
        return None
    factor, inside = holding[0].as_coeff_Mul()
    if not isinstance(inside, sympy.Abs) or factor not in (1, -1):
        return None
    return inside.args[0], int(factor), difference - holding[0]


def _bounds(joined, *, narrowest: bool):
    """Drop bounds that others imply: keep the narrower of two in an And, the wider in an Or."""
    slacks = [_slack(part) for part in joined.args]
    kept: list[Any] = []
    for part, slack in zip(joined.args, slacks, strict=True):
        room = [sympy.expand(slack - other) for other in slacks if slack is not None and other is not None]
        if any((difference.is_negative if narrowest else difference.is_positive) is True for difference in room):
            continue  # implied by another bound
        kept.append(part)
    return type(joined)(*kept)


def _contradicts_itself(conjunction: sympy.And) -> bool:
    """Whether two bounds exclude each other: x <= 0 and c - x <= 0 with c > 0."""
    slacks = [slack for slack in map(_slack, conjunction.args) if slack is not None]
    pairs = ((x, y) for number, x in enumerate(slacks) for y in slacks[:number])
    return any(sympy.expand(x + y).is_positive is True for x, y in pairs)


def _slack(part) -> Any | None:
    """x if ``part`` is equivalent to x <= 0 over integers, else None."""
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
    """``score`` simplified where ``predicate`` holds: each where() that it decides is replaced by the branch taken."""
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

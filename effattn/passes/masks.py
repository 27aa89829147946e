"""From one expression for the scores to a score, a predicate, and what happens to rows that see nothing.

Masks come as ``where(allowed, s, fill)``, as an added ``where(allowed, 0, fill)``, or both; the fill is -inf, the most
negative float, or another large negative number. Splitting keeps what the author wrote where the difference shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import Where, b, h, k, q
from effattn.ir.plan import EmptyRows
from effattn.ir.site import Layout

# A finite fill this low is a mask: exp underflows to exactly 0 unless every key of the row is masked.
FILL = -1e8
# Adding a fill this low to any score gives the fill itself in float32, so that a masked row is uniform.
ABSORBS = -1e30
HALF_FILL = -65504.0  # finfo(float16).min


class Unclear(Exception):
    """The scores cannot be told apart into a score and a mask; the message is the reason."""


@dataclass(frozen=True)
class Split:
    """score (a term in s), predicate, and the output of rows without a key, as far as fills decide it."""

    score: Any
    predicate: Any
    fills: frozenset[str]  # "inf", "absorbing", "replacing", "added"


def is_fill(value) -> bool:
    if value is sympy.S.NegativeInfinity:
        return True
    return value.is_number and value.is_real and (float(value) <= FILL or float(value) == HALF_FILL)


def split(term) -> Split:
    """Split ``term``, the scores before softmax with s for the raw score.

    Raises:
        Unclear: a mask stands where it has no meaning as one (inside tanh, multiplied, ...).
    """
    fills: set[str] = set()
    conditions: list[Any] = []

    def peel(value, replaced: bool):
        """``value`` without its masks; their conditions are collected."""
        if isinstance(value, Where):
            condition, yes, no = value.args
            for kept, dropped, holds in ((yes, no, condition), (no, yes, sympy.Not(condition))):
                if is_fill(dropped) and not is_fill(kept):
                    conditions.append(holds)
                    fills.add(_fill_kind(dropped, replaced))
                    return peel(kept, replaced)
            return value
        if isinstance(value, sympy.Add):
            return sympy.Add(*[peel(part, replaced and len(value.args) == 1) for part in value.args])
        return value

    score = peel(term, True)
    for part in score.atoms(sympy.S.NegativeInfinity.__class__) if score.has(sympy.S.NegativeInfinity) else ():
        raise Unclear(f"{part} remains in the score {score}")
    if score.has(sympy.nan) or score.has(sympy.zoo) or score.has(sympy.oo):
        raise Unclear(f"the score is not finite: {score}")
    return Split(score, simplify(sympy.And(*conditions)), frozenset(fills))


def _fill_kind(fill, replaced: bool) -> str:
    if fill is sympy.S.NegativeInfinity:
        return "inf"
    if replaced:
        return "replacing"
    return "absorbing" if float(fill) <= ABSORBS else "added"


def simplify(predicate) -> Any:
    """Conjunctions flattened and every inequality in one orientation: ``k <= ...`` or ``... - k < ...``."""
    if predicate in (sympy.true, sympy.false):
        return predicate
    if isinstance(predicate, (sympy.And, sympy.Or)):
        return type(predicate)(*[simplify(part) for part in predicate.args])
    if isinstance(predicate, sympy.Not):
        inner = predicate.args[0]
        negated = sympy.Not(inner)  # sympy turns Not of a relation into the opposite relation
        return simplify(negated) if negated != predicate else predicate
    if isinstance(predicate, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return _oriented(predicate)
    return predicate


def _oriented(atom):
    """An inequality of integers as ``k <= rest`` (upper bounds) or ``rest - k < constant`` (lower bounds)."""
    difference = atom.lhs - atom.rhs if isinstance(atom, (sympy.Le, sympy.Lt)) else atom.rhs - atom.lhs
    difference = sympy.expand(difference)
    strict = isinstance(atom, (sympy.Lt, sympy.Gt))
    if difference.is_integer is not True or not difference.has(k):
        return atom
    key = difference.coeff(k)
    if key == 1:
        rest = k - difference  # k < rest or k <= rest
        return sympy.Le(k, rest - 1 if strict else rest)
    if key == -1:
        constant, others = difference.as_coeff_Add()
        limit = -constant if strict else 1 - constant
        return sympy.Lt(others, limit)
    return atom


def empty_rows(found: Split, layout: Layout, position, sdpa: bool, dtype: str) -> EmptyRows:
    """What a row that may attend to nothing yields, as the author wrote it.

    Raises:
        Unclear: such rows can occur and the author's arithmetic on them cannot be reproduced.
    """
    if not found.fills or _every_row_sees_a_key(found.predicate, layout, position):
        return "never"
    if found.fills == {"inf"}:
        return "zero" if sdpa else "nan"
    if found.fills <= {"absorbing", "replacing"} and (dtype != "float16" or found.fills == {"replacing"}):
        return "mean"
    raise Unclear(
        "a row may attend to nothing, and what the author's fill values then give depends on rounding "
        f"(fills: {', '.join(sorted(found.fills))}, dtype {dtype})"
    )


def _every_row_sees_a_key(predicate, layout: Layout, position) -> bool:
    candidates = [sympy.Integer(0)]
    if _at_most(layout.q_len, layout.k_len):
        candidates.append(q)
    if position is not None and sympy.expand(position - q - (layout.k_len - layout.q_len)) == 0:
        candidates.append(position)
    return any(simplify(predicate.subs(k, candidate)) == sympy.true for candidate in candidates)


def _at_most(x, y) -> bool:
    return sympy.sympify(y - x).is_nonnegative is True


def query_position(predicate) -> Any | None:
    """The absolute position of query row q, from the causal condition ``k <= position``; None if there is none."""
    for part in expr.conjuncts(predicate):
        if isinstance(part, sympy.Le) and part.lhs == k and not part.rhs.has(k):
            offset = sympy.expand(part.rhs - q)
            if not offset.has(q, k, b, h, expr.s):
                return sympy.expand(part.rhs)
    return None

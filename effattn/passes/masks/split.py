"""Splits an expression for the scores into a score, a predicate, and the fills at masked keys.

Masks are ``where(allowed, s, fill)``, an added ``where(allowed, 0, fill)``, or several of both. The fill is -inf, the
lowest float, or another large negative number. For queries without keys the fills decide the result, so they are kept.

What counts is the value that reaches the softmax. A fill that is divided later, or that scores may be as low as, may
not hide its key; it stays in the score as user code computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import EmptyRows
from effattn.ir.expr import Where, b, h, k, q
from effattn.ir.site import Layout
from effattn.passes.masks.magnitude import LOWEST, not_overflowing, plausible
from effattn.passes.masks.predicates import assuming, simplify

# A finite fill this low masks: exp underflows to exactly 0, unless every key of the query is masked.
FILL = -1e8
UNDERFLOW = 104.0  # exp(-104) is 0 in float32

# A score plus a fill this low equals the fill in float32, so a query without keys gets uniform weights.
ABSORBS = -1e30
LARGE = 1000.0  # added to a larger number in half precision, a score of a few units loses all digits
LARGE_FLOAT32 = 2.0**16
HALF_FILL = -65504.0  # finfo(float16).min
INFINITE = sympy.S.NegativeInfinity


class Unclear(Exception):
    """The scores cannot be split into a score and a mask; the message is the reason."""


@dataclass(frozen=True)
class Fill:
    """The value at a masked key: ``value`` if it ``replaces`` the score, else the score plus ``value``."""

    value: Any
    replaces: bool


@dataclass(frozen=True)
class Split:
    """The score (a term in s), the predicate, and every fill that a masked key may have."""

    score: Any
    predicate: Any
    fills: frozenset[Fill]

    @property
    def threshold(self) -> float:
        """A number above every finite fill and below any score of an allowed key."""
        finite = [float(fill.value) for fill in self.fills if fill.value is not INFINITE]
        if not finite and plausible(self.score, in_half=False).low <= FILL:
            return -LOWEST / 2
        return max([FILL, *(value / 2 for value in finite)])


@dataclass(frozen=True)
class _Part:
    """A term without its masks; ``score`` is None if it is only a fill."""

    score: Any
    allowed: Any = sympy.true
    fills: frozenset[Fill] = frozenset()


def is_fill(value) -> bool:
    if value is INFINITE:
        return True
    return value.is_number and value.is_real and (float(value) <= FILL or float(value) == HALF_FILL)


def split(term) -> Split:
    """Split ``term``, the scores before the softmax, with s for the raw score.

    Raises:
        Unclear: a mask stands where it does not work as one (inside tanh, multiplied, ...).
    """
    part = _peel(sympy.sympify(term), sympy.Integer(1))
    if part.score is not None and not _hides(part):
        part = _peel(sympy.sympify(term), None)
    if part.score is None:
        raise Unclear("the mask allows nothing at all")
    predicate = simplify(part.allowed)
    score = assuming(part.score, predicate)
    if score.has(INFINITE):
        raise Unclear(f"the score contains -inf that is not a mask: {score}")
    if score.has(sympy.nan, sympy.zoo, sympy.oo):
        raise Unclear(f"the score is not finite: {score}")
    return Split(score, predicate, part.fills)


def _hides(part: _Part) -> bool:
    """Whether every finite fill is so far below any score that its weight underflows to 0."""
    fills = [fill for fill in part.fills if fill.value is not INFINITE]
    if not fills:
        return True
    for fill in fills:
        low, high = plausible(part.score, in_half=fill.value > FILL)
        if not float(fill.value) + (0.0 if fill.replaces else high) + UNDERFLOW <= low:
            return False
    return True


def _peel(term, factor) -> _Part:
    """Remove masks from ``term``, which is later multiplied by ``factor``. With factor None only -inf is a fill."""
    if isinstance(term, Where):
        return _peel_where(term, factor)
    if isinstance(term, sympy.Add):
        return _peel_sum([_peel(part, factor) for part in term.args])
    if isinstance(term, sympy.Mul) and (scaled := _peel_product(term, factor)) is not None:
        return scaled
    if isinstance(term, sympy.Max) and len(term.args) == 2:
        floor, rest = term.args if term.args[0].is_number else reversed(term.args)
        if _fills(floor, factor) and floor is not INFINITE:
            part = _peel(rest, factor)  # scores are never as low as a fill, so the clamp only raises other fills
            fills = frozenset(
                Fill(sympy.Max(fill.value, floor), fill.replaces or fill.value is INFINITE) for fill in part.fills
            )
            return _Part(part.score, part.allowed, fills)
    return _Part(term)


def _fills(value, factor) -> bool:
    """Whether ``value``, multiplied by ``factor``, is a fill."""
    return value is INFINITE or (factor is not None and value.is_number and is_fill(factor * value))


def _peel_product(term: sympy.Mul, outer) -> _Part | None:
    """A masked term times a positive factor; None for other products."""
    masked = [arg for arg in term.args if arg.has(Where)]
    factor = sympy.Mul(*[arg for arg in term.args if not arg.has(Where)])
    if len(masked) != 1 or not factor.is_positive:
        return None
    part = _peel(masked[0], outer * factor if outer is not None and factor.is_number else None)
    if not part.fills:
        return None
    fills = frozenset(Fill(_overflowing(factor * fill.value), fill.replaces) for fill in part.fills)
    return _Part(None if part.score is None else factor * part.score, part.allowed, fills)


def _overflowing(value):
    """A fill as float32 holds it."""
    return INFINITE if value.is_infinite or value < -LOWEST else value


def _peel_where(choice: Where, factor) -> _Part:
    condition, yes, no = choice.args
    kept, other = (
        _Part(None, sympy.false, frozenset({Fill(branch, True)})) if _fills(branch, factor) else _peel(branch, factor)
        for branch in (yes, no)
    )
    fills = kept.fills | other.fills
    if other.score is None:
        return _Part(kept.score, sympy.And(condition, kept.allowed), fills)
    if kept.score is None:
        return _Part(other.score, sympy.And(sympy.Not(condition), other.allowed), fills)
    if not fills:
        return _Part(Where(condition, yes, no))
    allowed = sympy.And(
        sympy.Or(sympy.Not(condition), kept.allowed), sympy.Or(condition, other.allowed)
    )  # reads better than an Or of two Ands, because one side is usually true
    same = (kept.score - other.score).is_zero is True
    score = kept.score if same else Where(condition, kept.score, other.score)
    return _Part(score, allowed, fills)


def _peel_sum(parts: list[_Part]) -> _Part:
    masked = [part for part in parts if part.fills]
    score = None if any(part.score is None for part in parts) else sympy.Add(*[part.score for part in parts])
    allowed = sympy.And(*[part.allowed for part in parts])
    constant = sympy.Add(*[part.score for part in parts if not part.fills]) if masked else sympy.Integer(0)
    fills: set[Fill] = set()
    for part in masked:
        for fill in part.fills:
            if constant.is_number:
                fills.add(Fill(fill.value + constant, fill.replaces and len(masked) == 1))
            else:
                fills.add(Fill(fill.value, False))
    if len(masked) > 1 and any(fill.value is not INFINITE for fill in fills):
        # a key masked by several masks holds the sum of their fills
        fills.add(Fill(sympy.Add(*[min(fill.value for fill in part.fills) for part in masked]), False))
    return _Part(score, allowed, frozenset(fills))


def may_be_infinite(score) -> bool:
    """Whether a score itself may be -inf, such as the logarithm of a distance of 0."""
    return any(logarithm.args[0].is_positive is not True for logarithm in score.atoms(sympy.log))


def not_lowered(score, lose_digits: Callable[[Any, Any], bool]) -> list[Any]:
    """Conditions under which large summands of a score are not added, so that it keeps its digits.

    The condition is false for a summand that raises the score: the scores that lose digits are then the ones that
    count.
    ``lose_digits(factor, number)`` says whether a summand ``factor * where(..., number, ...)`` is that large.
    """
    sums = [term for term in sympy.preorder_traversal(score) if isinstance(term, sympy.Add)]
    parts = [(part.as_coeff_Mul()[0], part.atoms(Where)) for term in sums for part in term.args]
    found: list[Any] = []
    for factor, (condition, yes, no) in ((factor, choice.args) for factor, choices in parts for choice in choices):
        if no.is_number and lose_digits(factor, no):
            found.append(condition if factor * no < 0 else sympy.false)
        elif yes.is_number and lose_digits(factor, yes):
            found.append(sympy.Not(condition) if factor * yes < 0 else sympy.false)
    return found


def in_half(factor, number) -> bool:
    """Whether adding ``number`` in half precision leaves no digits of a score."""
    return abs(number) > LARGE


def in_float32(factor, number) -> bool:
    """The same in float32, where the order of summation decides which digits are left."""
    return abs(number * factor) > LARGE_FLOAT32


def empty_rows(found: Split, layout: Layout, *, sdpa: bool, dtype: str, data: frozenset[str]) -> EmptyRows:
    """The output of a query without keys, as user code defines it.

    Args:
        sdpa: SDPA gives 0 for such a query, a softmax of -inf gives NaN.
        dtype: of the scores. Adding the lowest float16 to a score is not exact.
        data: names of captured tensors that may mask keys too: an additive mask passed by the caller.

    Raises:
        Unclear: such queries may occur and their result in user code cannot be reproduced.
    """
    nothing: EmptyRows = "zero" if sdpa else "nan"
    masks_by_data = any(load.name in data for load in expr.loads_of(found.score)) or may_be_infinite(found.score)
    values = {fill.value for fill in found.fills}
    if values <= {INFINITE}:
        never = not masks_by_data and (not values or every_row_sees_a_key(found.predicate, layout))
        return "never" if never else nothing
    if not masks_by_data:
        if every_row_sees_a_key(found.predicate, layout):
            return "never"
        if len(values) == 1 and all(fill.replaces or _absorbs(fill.value, dtype) for fill in found.fills):
            return "mean"
    raise Unclear(
        "a row may attend to nothing, and what the user's fill values then give depends on rounding "
        f"(fills: {', '.join(sorted(map(_spelled, found.fills)))}, scores in {dtype}"
        + (", and data is added that may mask too)" if masks_by_data else ")")
    )


def may_stay_in_score(found: Split, term, dtype: str) -> bool:
    """Whether a kernel that computes ``term`` with its fills gives the same result as user code.

    It does if each fill absorbs any score, and two of them together also overflow to -inf in bfloat16.
    """
    enough = 0.0 if dtype == "float32" else -0.6 * LOWEST
    fills = [fill.value for fill in found.fills]
    numbers = [float(number) for number in term.atoms(sympy.Number) if number.is_finite]
    held = all(abs(number) <= LOWEST for number in numbers) and not term.has(sympy.oo, -sympy.oo, sympy.nan)
    held = held and not not_overflowing(term)
    return held and bool(fills) and all(_absorbs(fill, dtype) and fill <= enough for fill in fills)


def _absorbs(fill, dtype: str) -> bool:
    return dtype != "float16" and float(fill) <= ABSORBS


def _spelled(fill: Fill) -> str:
    return f"{float(fill.value):.4g}" + ("" if fill.replaces else " added")


def every_row_sees_a_key(predicate, layout: Layout) -> bool:
    """Whether every query keeps a key that can be named: the first, or its own, counted from either end."""
    candidates = [sympy.Integer(0)]
    if _at_most(layout.q_len, layout.k_len):
        candidates += [q, q + layout.k_len - layout.q_len]
    return any(simplify(predicate.subs(k, candidate)) == sympy.true for candidate in candidates)


def _at_most(x, y) -> bool:
    return sympy.sympify(y - x).is_nonnegative is True


def query_position(predicate, layout: Layout) -> Any | None:
    """The absolute position of query q, from the causal condition ``k <= position``; None if there is none.

    A query that sees keys beyond its own position (a two-sided window) has none.
    """
    found = []
    for part in expr.conjuncts(predicate):
        if not isinstance(part, (sympy.Le, sympy.Lt)) or part.lhs != k or part.rhs.has(k, b, h, expr.s):
            continue
        last = sympy.expand(part.rhs if isinstance(part, sympy.Le) else part.rhs - 1)
        one_row = layout.q_len == 1 and layout.k_len != 1 and not last.has(q)  # decode: q is 0
        if one_row or _is_offset(sympy.expand(last - q), layout):
            found.append(last)
    return found[0] if len(found) == 1 else None


def _is_offset(beyond, layout: Layout) -> bool:
    """Whether ``q + beyond`` may be the query's own position: it is not beyond the last key."""
    if beyond.has(q):
        return False
    known_at_run_time = expr.loads_of(beyond) or beyond.free_symbols - {expr.Nq, expr.Nk}
    room = sympy.expand(layout.k_len - layout.q_len - beyond)
    return bool(known_at_run_time) or beyond.is_nonpositive is True or room.is_nonnegative is True

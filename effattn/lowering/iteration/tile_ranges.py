"""Which tiles of a predicate are full, partial or empty, derived from its inequalities.

A predicate over (q, k) is split into

* a *band* ``lower(q) <= k < upper(q)`` from its linear conditions, also with minima, maxima and choices by head;
* at most one *choice* (an Or) of a narrower band, a *prefix* ``k < c`` (sinks) and a *list* of blocks at power-of-two
  distances, for sliding windows with sinks and PowerAttention;
* a *residual* of conditions on data, which are tested on every tile.

Every bound is monotone in q. So the first and last query of a tile [q0, q1] give the keys that some query needs and the
keys that every query needs. Nothing is evaluated over N x N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import FloorDiv, IsPowerOfTwo, k, q

CLEAR_FRACTION = 2**-8  # a constant closer than this to an integer might be rounded to it

MOST_KEYS = 2**30  # bounds are clamped to this; no larger number of keys occurs


@dataclass(frozen=True)
class PowerList:
    """Key blocks at distance 1, 2, 4, ... from the query's block, in blocks of ``block`` tokens.

    ``position`` is the query's absolute position: its block is ``position // block``.
    """

    block: int
    position: Any


@dataclass(frozen=True)
class TileRanges:
    """The keys that query q visits. All expressions are in q, Nq, Nk, scalars and captured tensors without q or k.

    Query q *structurally* keeps key k if every ``lower <= k``, every ``k < upper`` and, if ``choice`` is set, at least
    one of: every ``near_lower <= k`` and every ``k < near_upper``; ``k < prefix``; k in the ``powers`` list.
    Bounds never decrease in q; ``prefix`` does not depend on q.
    """

    lower: tuple[Any, ...] = ()
    upper: tuple[Any, ...] = ()
    choice: bool = False
    near_lower: tuple[Any, ...] | None = None  # None: the choice has no near band
    near_upper: tuple[Any, ...] = ()
    prefix: Any | None = None
    powers: PowerList | None = None
    structural: Any = sympy.true  # the conditions above as one predicate: tested on partial tiles
    residual: Any = sympy.true  # conditions on data: tested on every tile
    others: Any = sympy.true  # all that ``lower`` and ``upper`` do not say: the choice and the residual


def tile_ranges(predicate) -> TileRanges:
    """The tile ranges of a predicate. Conditions without usable bounds go to the residual: slower, never wrong."""
    lower: list = []
    upper: list = []
    structural: list = []
    residual: list = []
    others: list = []
    choice: TileRanges | None = None
    for part in expr.conjuncts(predicate):
        bounds = [_bound(atom) for atom in _atoms(part)]
        if None not in bounds:
            for side, value in (bound for bound in bounds if bound is not None):
                (lower if side == "lower" else upper).append(value)
            structural.append(part)
        elif isinstance(part, sympy.Or) and choice is None and (choice := _choice(part)) is not None:
            structural.append(part)
            others.append(part)
        else:
            residual.append(part)
            others.append(part)
    near = choice or TileRanges()
    return TileRanges(
        lower=tuple(lower),
        upper=tuple(upper),
        choice=choice is not None,
        near_lower=near.near_lower,
        near_upper=near.near_upper,
        prefix=near.prefix,
        powers=near.powers,
        structural=sympy.And(*structural),
        residual=sympy.And(*residual),
        others=sympy.And(*others),
    )


@lru_cache(maxsize=4096)
def by_formula(predicate) -> bool:
    """Whether the ranges say all there is to know; else the tiles to visit come from a block map."""
    return tile_ranges(predicate).residual == sympy.true


def within_band(ranges: TileRanges) -> Any:
    """The predicate and ``k < Nk``; where it is a band, as one bound for each side, computed once for each query."""
    if ranges.others != sympy.true:
        return sympy.And(ranges.structural, ranges.residual, k < expr.Nk)
    bounds = [k < sympy.Min(expr.Nk, *ranges.upper)]
    bounds += [k >= sympy.Max(*ranges.lower)] if ranges.lower else []
    return sympy.And(*bounds, ranges.others)


def key_conditions(residual) -> tuple:
    """(conditions on data that depend on batch and key only, such as padding; all others)."""
    alone: list = []
    others: list = []
    for part in expr.conjuncts(residual):
        by_key = expr.loads_of(part) and not expr.free_symbols(part) & {expr.h, expr.q, expr.s}
        (alone if by_key else others).append(part)
    return sympy.And(*alone), sympy.And(*others)


def text_conditions(predicate):
    """The conditions on data that say where the text of a query begins and ends.

    Not those that hide a query whole, nor block lists passed by the caller: these can only hide whole blocks, and none
    of a mask from create_block_mask.
    """
    by_formula = expr.conjuncts(tile_ranges(predicate).structural)
    parts = [
        part
        for part in expr.conjuncts(predicate)
        if part.has(k) and (part not in by_formula or (expr.loads_of(part) and not part.has(q)))
    ]
    lists = [part for part in parts if isinstance(part, sympy.Ne) and isinstance(part.lhs, expr.Load)]
    return sympy.And(*[part for part in parts if part not in lists or not expr.is_of_blocks(part.lhs)])


def _atoms(part) -> list:
    """Conditions that together say the same as one, each of which may be a bound."""
    if isinstance(part, (sympy.Le, sympy.Lt)) and isinstance(part.lhs, sympy.Abs) and part.lhs.has(k):
        return [part.func(sign * part.lhs.args[0], part.rhs) for sign in (1, -1)]
    if isinstance(part, (sympy.Ge, sympy.Gt)) and isinstance(part.rhs, sympy.Abs) and part.rhs.has(k):
        return [part.func(part.lhs, sign * part.rhs.args[0]) for sign in (1, -1)]
    if isinstance(part, sympy.Or) and len(moving := [arg for arg in part.args if arg.has(q, k)]) == 1:
        for_all = [arg for arg in part.args if arg not in moving]
        return [sympy.Or(*for_all, atom) for each in expr.conjuncts(moving[0]) for atom in _atoms(each)]
    return [part]


def _choice(disjunction: sympy.Or) -> TileRanges | None:
    """An Or of one band, prefixes and one power-of-two list; None for any other."""
    near_lower = near_upper = prefix = powers = None
    for part in disjunction.args:
        if isinstance(part, IsPowerOfTwo):
            if powers is not None or (powers := _power_list(part)) is None:
                return None
            continue
        found = [_bound(atom) for atom in expr.conjuncts(part)]
        bounds = [bound for bound in found if bound is not None]
        if len(bounds) < len(found):
            return None
        constant_upper = len(bounds) == 1 and bounds[0][0] == "upper" and not bounds[0][1].has(q)
        if constant_upper:
            prefix = bounds[0][1] if prefix is None else sympy.Max(prefix, bounds[0][1])
        elif near_lower is None:
            near_lower = tuple(value for side, value in bounds if side == "lower")
            near_upper = tuple(value for side, value in bounds if side == "upper")
        else:
            return None
    return TileRanges(near_lower=near_lower, near_upper=near_upper or (), prefix=prefix, powers=powers)


def _bound(atom) -> tuple[str, Any] | None:
    """``("lower", e)`` for k >= e(q) or ``("upper", e)`` for k < e(q), e never decreasing in q; else None."""
    if isinstance(atom, sympy.Or):
        return _bound_or_none(atom)
    if not isinstance(atom, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    slack = atom.lhs - atom.rhs if isinstance(atom, (sympy.Le, sympy.Lt)) else atom.rhs - atom.lhs
    strict = isinstance(atom, (sympy.Lt, sympy.Gt))  # slack < 0, else slack <= 0
    slack = sympy.expand(slack)
    key_terms = [term for term in sympy.Add.make_args(slack) if term.has(k)]
    if len(key_terms) != 1:
        return None
    sign, key = key_terms[0].as_coeff_Mul()
    rest = slack - key_terms[0]
    if sign not in (1, -1) or not _only_row_terms(rest):
        return None
    if key == k:
        block = sympy.Integer(1)
    elif isinstance(key, FloorDiv) and key.args[0] == k and key.args[1].is_Integer:
        block = key.args[1]
    else:
        return None
    # sign 1:  key <= -rest  (key < -rest)   -> key < floor(-rest) + 1  (key < ceiling(-rest))
    # sign -1: key >=  rest  (key >  rest)   -> key >= ceiling(rest)    (key >= floor(rest) + 1)
    limit = _whole(-rest if sign == 1 else rest, up=strict == (sign == 1))
    if limit is None or not _never_decreases(limit):
        return None
    one_more = strict != (sign == 1)
    if expr.loads_of(limit):  # data may be as large as their dtype allows, so clamp before adding or multiplying
        limit = sympy.Min(limit, MOST_KEYS // block) if one_more or block != 1 else limit
        limit = sympy.Max(limit, -MOST_KEYS // block) if block != 1 else limit
    limit = limit + 1 if one_more else limit
    return ("upper" if sign == 1 else "lower", sympy.expand(limit * block))


def _bound_or_none(disjunction: sympy.Or) -> tuple[str, Any] | None:
    """The bound of ``Or(condition, atom)``; a condition that is the same for all pairs of a head lifts it."""
    moving = [arg for arg in disjunction.args if arg.has(q, k)]
    condition = sympy.Or(*[arg for arg in disjunction.args if arg not in moving])
    if len(moving) != 1 or not _only_row_terms(condition) or (found := _bound(moving[0])) is None:
        return None
    side, value = found
    return side, expr.Where(condition, sympy.Integer(0 if side == "lower" else MOST_KEYS), value)


def _whole(term, up: bool):
    """``term`` rounded to an integer; None if other parts than its constant may be fractions.

    Kernels compare in float32. A fraction that float32 might round to an integer gives None, so it is compared there.
    """
    constant, rest = sympy.expand(term).as_coeff_Add()
    if not _is_whole(rest) or not constant.is_finite:
        return None
    if constant.is_integer is not True and 0 < abs(constant - round(constant)) < CLEAR_FRACTION:
        return None
    return rest + (sympy.ceiling(constant) if up else sympy.floor(constant))


def _is_whole(term) -> bool:
    if isinstance(term, expr.Where):
        return all(_is_whole(branch) for branch in term.args[1:])
    if isinstance(term, (sympy.Add, sympy.Mul, sympy.Min, sympy.Max, FloorDiv)):
        return all(_is_whole(arg) for arg in term.args)
    return bool(term.is_integer)


def _only_row_terms(term) -> bool:
    """Whether a term can be computed once per tile: without s, and with integer loads that do not depend on q or k."""
    if term.has(expr.s):
        return False
    return all(isinstance(part, expr.IntLoad) and not part.has(q, k) for part in expr.loads_of(term))


def _never_decreases(term) -> bool:
    for part in sympy.Add.make_args(sympy.expand(term)):
        if not part.has(q):
            continue
        factor, row = part.as_coeff_Mul()
        if not (factor.is_Integer and factor > 0):
            return False
        if isinstance(row, FloorDiv) and row.args[1].is_Integer and not row.args[1].has(q):
            if not _never_decreases(row.args[0]):
                return False
        elif isinstance(row, (sympy.Min, sympy.Max)) or (isinstance(row, expr.Where) and not row.args[0].has(q)):
            branches = row.args[1:] if isinstance(row, expr.Where) else row.args
            if not all(_never_decreases(branch) for branch in branches):
                return False
        elif row != q:
            return False
    return True


def _power_list(atom: IsPowerOfTwo) -> PowerList | None:
    """The list of ``IsPowerOfTwo(FloorDiv(position, block) - FloorDiv(k, block))``; None for other atoms."""
    distance = sympy.expand(atom.args[0])
    key_terms = [term for term in sympy.Add.make_args(distance) if term.has(k)]
    if len(key_terms) != 1:
        return None
    sign, key = key_terms[0].as_coeff_Mul()
    row = distance - key_terms[0]
    if sign != -1 or not isinstance(key, FloorDiv) or key.args[0] != k or not isinstance(row, FloorDiv):
        return None
    block = key.args[1]
    if not block.is_Integer or row.args[1] != block:
        return None
    if not (row.args[0].is_integer and _only_row_terms(row.args[0]) and _never_decreases(row.args[0])):
        return None
    return PowerList(int(block), row.args[0])

"""A predicate as a block map evaluates it: what depends on queries alone, or on keys alone, is tabulated first.

A number of that kind enters by its minimum and maximum over a block of tokens, a condition by whether it holds for some
and for all of them. So ``document[b, q] == document[b, k]`` compares two ranges, and an index may be computed in any
way (``document[offset + q]``, ``start[order[k]]``): it is looked up token by token, once. Tensors with a value for each
query and key are tabulated by pairs of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.expr import FloorDiv, IsPowerOfTwo, Load, Modulo, Where, b, h, k, q

SIDES = {"q": (q,), "k": (k,), "qk": (q, k)}
# operations whose result for a block is known better token by token
UNEVEN = (Load, Modulo, Where, IsPowerOfTwo, expr.Bits, expr.Table)


@dataclass(frozen=True)
class Table:
    """A term that is evaluated for every token of a block, or every pair of tokens of a pair of blocks."""

    name: str  # by which the rule reads it
    term: Any  # a condition is 0 or 1
    side: str  # a key of ``SIDES``
    is_condition: bool = False


@dataclass(frozen=True)
class BlockRule:
    """A rule whose loads named in ``tables`` stand for their terms."""

    rule: Any
    tables: tuple[Table, ...]
    by_batch: bool  # whether any part of the rule depends on the batch
    by_head: bool

    def of_side(self, *sides: str) -> tuple[Table, ...]:
        return tuple(table for table in self.tables if table.side in sides)


@dataclass(frozen=True)
class RuleAlone:
    """What a block map reads of an attention: equal for all layers that share a mask."""

    spec: AttentionSpec  # without keep and score, and with the captured tensors and numbers of the rule only
    captures: tuple[int, ...]  # places of these among those of the attention
    scalars: tuple[int, ...]
    numbers: tuple[int, ...]

    def given(self, captures: Sequence[Any], scalars: Sequence[Any], numbers: Sequence[Any]) -> tuple[list, list, list]:
        """The captured tensors, scalars and numbers of the rule, from those of the attention."""
        return (
            [captures[place] for place in self.captures],
            [scalars[place] for place in self.scalars],
            [numbers[place] for place in self.numbers],
        )


def rule_alone(attention: AttentionSpec) -> RuleAlone:
    """The rule of an attention as an attention of its own."""
    loaded = {load.name for load in expr.loads_of(attention.rule)}
    symbols = {symbol.name for symbol in expr.free_symbols(attention.rule)}
    captures = tuple(place for place, each in enumerate(attention.captures) if each.name in loaded)
    scalars = tuple(place for place, name in enumerate(attention.scalars) if name in symbols)
    numbers = tuple(place for place, name in enumerate(attention.numbers) if name in symbols)
    spec = AttentionSpec(
        expr.s,
        attention.rule,
        captures=tuple(attention.captures[place] for place in captures),
        scalars=tuple(attention.scalars[place] for place in scalars),
        numbers=tuple(attention.numbers[place] for place in numbers),
    )
    return RuleAlone(spec, captures, scalars, numbers)


@lru_cache(maxsize=1024)
def block_rule(rule: Any) -> BlockRule:
    """The rule with its tables."""
    builder = _Builder()
    found = builder.visit(sympy.sympify(rule))
    symbols = expr.free_symbols(rule)
    return BlockRule(found, tuple(builder.tables.values()), b in symbols, h in symbols)


def undecided(rule: Any) -> tuple[Any, ...]:
    """The conditions that ranges rarely decide for a pair of blocks. Its tiles are tested: right, and slower."""
    found = block_rule(rule)
    names = {table.name for table in found.tables}
    atoms = found.rule.atoms(sympy.core.relational.Relational, IsPowerOfTwo)
    return tuple(sorted((atom for atom in atoms if _is_undecided(atom, names)), key=sympy.default_sort_key))


def _is_undecided(atom: Any, tables: set[str]) -> bool:
    """Whether an operation of it mixes single queries with single keys unevenly."""
    return any(
        _side(part.xreplace({whole: sympy.Integer(0) for whole in part.atoms(FloorDiv)})) == "qk"
        and not (isinstance(part, Load) and (part.name in tables or _is_by_one_index(part)))
        for part in atom.atoms(Modulo, IsPowerOfTwo, expr.Bits, Load)
    )


def _is_by_one_index(load: Load) -> bool:
    """Whether one index alone depends on positions, so that the least and greatest element in its range are found."""
    moving = [index for index in load.indices if _side(index)]
    return len(moving) == 1 and not expr.loads_of(moving[0])


class _Builder:
    def __init__(self) -> None:
        self.tables: dict[Any, Table] = {}

    def visit(self, term):
        side = _side(term)
        if side in ("q", "k"):
            if not _is_uneven(term, side):
                return term
            if not _rounds(term):
                return self.tabulated(term, side)
        elif side != "qk":
            return term
        if isinstance(term, Load):
            return self.tabulated(term, side) if _is_of_pairs(term) else self.with_indices(term)
        args = _together(term)
        visited = [self.visit(arg) for arg in args]
        return term if visited == list(term.args) else term.func(*visited)

    def with_indices(self, load: Load):
        return load.func(load.args[0], *(self.visit(index) for index in load.indices))

    def tabulated(self, term, side: str):
        if term not in self.tables:
            # no captured tensor has such a name
            self.tables[term] = Table(f"#{len(self.tables)}", _as_number(term), side, isinstance(term, Boolean))
        integer = isinstance(term, Boolean) or term.is_integer is True
        value = expr.load(self.tables[term].name, [b, h, *SIDES[side]], integer=integer)
        return sympy.Ne(value, 0) if isinstance(term, Boolean) else value


def _as_number(term):
    return Where(term, sympy.Integer(1), sympy.Integer(0)) if isinstance(term, Boolean) else term


def _side(term) -> str:
    free = expr.free_symbols(term)
    return ("q" if q in free else "") + ("k" if k in free else "")


def _is_uneven(term, side: str) -> bool:
    """Whether ranges would say less of a term than its values do, so that looking each of them up pays."""
    (index,) = SIDES[side]
    return any(part.has(index) for part in term.atoms(*UNEVEN))


def _rounds(term) -> bool:
    """Whether a term computes in floating point, which is widened operation by operation instead."""
    exact = (Load, Where, expr.Table, sympy.Min, sympy.Max, Boolean)
    return any(
        bool(part.args) and part.is_integer is not True and not isinstance(part, exact) and not part.is_number
        for part in sympy.preorder_traversal(term)
    )


def _is_of_pairs(load: Load) -> bool:
    """Whether a tensor has an element for each query and key: read once, it takes as long as its mask would."""
    return {q, k} <= set(load.indices) and all(index in (b, h, q, k) or index.is_number for index in load.indices)


def _together(term) -> list:
    """The operands of a term, with those of one side joined: one table says more of their And than two do.

    Sums of floats are computed in their own order.
    """
    joins = isinstance(term, (sympy.And, sympy.Or)) or (isinstance(term, sympy.Add) and term.is_integer)
    if not joins:
        return list(term.args)
    groups: dict[str, list] = {}
    for arg in term.args:
        groups.setdefault(_side(arg), []).append(arg)
    found = groups.pop("qk", []) + groups.pop("", [])
    for side, args in groups.items():
        joined = term.func(*args)
        found += [joined] if len(args) > 1 and _is_uneven(joined, side) and not _rounds(joined) else args
    return found

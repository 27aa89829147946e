"""The terms of predicates and score expressions, in sympy.

The symbols ``b, h, q, k`` index the batch, query head, query and key of one attention. ``s`` is the raw score
(query . key, unscaled). ``Nq`` and ``Nk`` are the numbers of queries and keys. A captured tensor appears as a
:class:`Load`: its name and symbolic indices.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFunction

b, h, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
INDICES = (b, h, q, k)
s = sympy.Symbol("s", real=True)
Nq = sympy.Symbol("Nq", integer=True, positive=True)
Nk = sympy.Symbol("Nk", integer=True, positive=True)

LOWEST = -3.4028234663852886e38  # the lowest float32


def scalar(name: str) -> sympy.Symbol:
    """An integer passed at run time (a symbolic length other than Nq and Nk)."""
    return sympy.Symbol(name, integer=True)


def number(name: str) -> sympy.Symbol:
    """A float passed at run time (a scale that is a graph value)."""
    return sympy.Symbol(name, real=True)


class Load(sympy.Function):
    """``Load(name, i0, i1, ...)``: one element of a captured floating-point tensor."""

    is_real = True

    @property
    def name(self) -> str:
        return self.args[0].name  # str() would go through a printer of sympy

    @property
    def indices(self) -> tuple[sympy.Expr, ...]:
        return self.args[1:]


class IntLoad(Load):
    """A load from an integer or boolean tensor. A boolean mask is ``Ne(IntLoad(...), 0)``."""

    is_integer = True


def load(name: str, indices, *, integer: bool) -> Load:
    """A load by name. The name is the first argument, so loads from two tensors never compare equal."""
    return (IntLoad if integer else Load)(sympy.Symbol(name), *indices)


# Computed by the op, not passed: the first key that conditions on data allow, to all queries of a batch or to one; or
# Nk if the keys that they allow are not consecutive.
FIRST_KEY = "first_allowed_key"
first_key = load(FIRST_KEY, (b,), integer=True)
first_key_of_query = load(FIRST_KEY, (b, q), integer=True)


class FloorDiv(sympy.Function):
    """Integer division rounding down; the divisor is positive."""

    is_integer = True

    @classmethod
    def eval(cls, numerator, divisor):
        if divisor == 1:
            return numerator
        if numerator.is_Integer and divisor.is_Integer:
            return sympy.Integer(int(numerator) // int(divisor))
        if numerator.is_zero:
            return sympy.Integer(0)
        return None

    def _eval_is_nonnegative(self):
        numerator, divisor = self.args
        return True if numerator.is_nonnegative and divisor.is_positive else None


class Modulo(sympy.Function):
    """Remainder of :class:`FloorDiv`; never negative."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, numerator, divisor):
        if divisor == 1 or numerator.is_zero:
            return sympy.Integer(0)
        if numerator.is_Integer and divisor.is_Integer:
            return sympy.Integer(int(numerator) % int(divisor))
        return None


class Bits(sympy.Function):
    """A bitwise operation on two integers in two's complement."""

    is_integer = True

    @classmethod
    def eval(cls, x, y):
        if x.is_Integer and y.is_Integer:
            return sympy.Integer(cls.of(int(x), int(y)))
        return None


class BitAnd(Bits):
    of = operator.and_

    def _eval_is_nonnegative(self):
        return True if any(arg.is_nonnegative for arg in self.args) else None


class BitOr(Bits):
    of = operator.or_

    def _eval_is_nonnegative(self):
        return True if all(arg.is_nonnegative for arg in self.args) else None


class BitXor(Bits):
    of = operator.xor

    def _eval_is_nonnegative(self):
        return True if all(arg.is_nonnegative for arg in self.args) else None


class Where(sympy.Function):
    """``Where(condition, x, y)``: x where the condition holds, else y."""

    is_real = True

    @classmethod
    def eval(cls, condition, x, y):
        if condition == sympy.true or x == y:
            return x
        if condition == sympy.false:
            return y
        return None


class Table(sympy.Function):
    """``Table(index, v0, v1, ...)``: an element of a constant table, for example a window size per head.

    The index is clamped to the table.
    """

    is_real = True
    LONGEST = 256

    @classmethod
    def eval(cls, index, *values):
        if not 0 < len(values) <= cls.LONGEST or not all(value.is_Number and value.is_finite for value in values):
            raise ValueError(f"a table holds 1 to {cls.LONGEST} finite numbers, got {len(values)}: {values[:4]}")
        if len(set(values)) == 1:
            return values[0]
        return values[min(max(int(index), 0), len(values) - 1)] if index.is_Integer else None

    @property
    def index(self) -> sympy.Expr:
        return self.args[0]

    @property
    def values(self) -> tuple[sympy.Number, ...]:
        return self.args[1:]

    def _eval_is_integer(self):
        return all(value.is_integer for value in self.values)


class Group(sympy.Function):
    """A sum that sympy must not take apart: ``0.1*(t[q] - t[k])``.

    Expanded, ``s + 0.1*t[q] - 0.1*t[k]`` would lose the digits of s where t is large.
    """

    is_real = True

    @classmethod
    def eval(cls, x):
        return None if isinstance(x, sympy.Add) else x

    def _eval_is_integer(self):
        return self.args[0].is_integer


class IsPowerOfTwo(BooleanFunction):
    """Whether the argument is a power of two: 1, 2, 4, 8, ..."""

    @classmethod
    def eval(cls, x):
        if x.is_Integer:
            value = int(x)
            return sympy.true if value > 0 and value & (value - 1) == 0 else sympy.false
        return None


def plain_scale(score):
    """c if the score is c * s with c a constant or one float passed at run time, else None."""
    scale = sympy.expand(score).coeff(s)
    if sympy.expand(score - scale * s) != 0 or scale.has(*INDICES, s) or loads_of(scale):
        return None
    known_at_run_time = scale.is_Symbol and not scale.is_integer
    return scale if scale.is_number or known_at_run_time else None


def conjuncts(predicate) -> tuple:
    """The operands of an And, or the predicate itself; () for true."""
    if predicate == sympy.true:
        return ()
    return tuple(predicate.args) if isinstance(predicate, sympy.And) else (predicate,)


def loads_of(*terms) -> list[Load]:
    """Every distinct load in the terms, in a stable order."""
    if len(terms) == 1:
        return list(_loads_in(sympy.sympify(terms[0])))
    found = {load for term in terms for load in _loads_in(sympy.sympify(term))}
    return sorted(found, key=sympy.default_sort_key)


@lru_cache(maxsize=4096)  # layers that are alike ask for the same terms again
def _loads_in(term) -> tuple[Load, ...]:
    return tuple(sorted(term.atoms(Load), key=sympy.default_sort_key))


def is_of_blocks(load: Load) -> bool:
    """Whether the tensor has one element for each pair of a query block and a key block."""
    places = [index for index in load.indices if index.has(q, k)]
    return {index.args[0] for index in places if isinstance(index, FloorDiv)} == {q, k} and len(places) == 2


def free_symbols(*terms) -> set[sympy.Symbol]:
    """Symbols of the terms, without the names of captured tensors."""
    found: set[sympy.Symbol] = set()
    for term in terms:
        names = {load.args[0] for load in loads_of(term)}
        found |= sympy.sympify(term).free_symbols - names
    return found


def nonzero(value):
    """``value != 0`` as a boolean; a where() of numbers becomes its conditions."""
    if not isinstance(value, Where) or not _chooses_numbers(value):
        return sympy.Ne(value, 0)
    condition, yes, no = value.args[0], *(nonzero(branch) for branch in value.args[1:])
    if yes == no:
        return yes
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def _chooses_numbers(value) -> bool:
    """Whether a value is a number or a where() of numbers, possibly nested."""
    if isinstance(value, Where):
        return all(_chooses_numbers(branch) for branch in value.args[1:])
    return bool(value.is_number)


def tree_size(term: Any, known: dict[int, tuple[Any, int]]) -> int:
    """The number of nodes of a term as a tree, counted without visiting shared parts twice.

    ``known`` caches counts by id. It also holds the terms, so that their ids stay valid.
    """
    waiting = [term]
    while waiting:
        part = waiting[-1]
        if id(part) in known:
            waiting.pop()
            continue
        args = getattr(part, "args", ())
        missing = [arg for arg in args if id(arg) not in known]
        if missing:
            waiting += missing
            continue
        known[id(part)] = (part, 1 + sum(known[id(arg)][1] for arg in args))
        waiting.pop()
    return known[id(term)][1]

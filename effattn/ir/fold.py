"""One traversal of an expression, shared by all targets.

An *algebra* defines each operation: on torch tensors (portable target, checks), on Python integers (tile bounds), or as
source text (generated kernels). A new operation needs an entry here and a method in each algebra.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, ClassVar, Protocol

import sympy

from effattn.errors import EffattnError
from effattn.ir.expr import BitAnd, BitOr, BitXor, FloorDiv, Group, IsPowerOfTwo, Load, Modulo, Table, Where


class Algebra(Protocol):
    """The interface of an algebra. Values are of any type."""

    def constant(self, value: int | float | bool) -> Any: ...
    def symbol(self, name: str) -> Any: ...
    def load(self, name: str, indices: list[Any]) -> Any: ...
    def call(self, operation: str, *args: Any) -> Any: ...


# sympy class -> operation name passed to ``Algebra.call``
OPERATIONS: dict[type, str] = {
    sympy.Le: "le",
    sympy.Lt: "lt",
    sympy.Ge: "ge",
    sympy.Gt: "gt",
    sympy.Eq: "eq",
    sympy.Ne: "ne",
    sympy.Not: "not",
    sympy.Abs: "abs",
    sympy.tanh: "tanh",
    sympy.exp: "exp",
    sympy.log: "log",
    sympy.sin: "sin",
    sympy.cos: "cos",
    sympy.sign: "sign",
    Group: "group",
    FloorDiv: "floordiv",
    Modulo: "mod",
    BitAnd: "bit_and",
    BitOr: "bit_or",
    BitXor: "bit_xor",
    Where: "where",
    IsPowerOfTwo: "is_power_of_two",
}
# the same for variadic operations, folded two arguments at a time
CHAINS: dict[type, str] = {
    sympy.Add: "add",
    sympy.Mul: "mul",
    sympy.And: "and",
    sympy.Or: "or",
    sympy.Min: "min",
    sympy.Max: "max",
}


HIGHEST_POWER = 9  # of a variable base: eight, and one more in a derivative


class UnknownOperation(EffattnError):
    """The expression contains a sympy operation that no target computes."""


def fold(expression, algebra: Algebra) -> Any:
    """Evaluate ``expression`` (a sympy term) in ``algebra``. Shared subterms are computed once.

    Raises:
        UnknownOperation: no target computes one of its operations.
    """
    done: dict[sympy.Basic, Any] = {}

    def visit(term):
        if term not in done:
            done[term] = step(term)
        return done[term]

    def step(term):
        if term in (sympy.true, sympy.false):
            return algebra.constant(term == sympy.true)
        if term.is_Integer:
            return algebra.constant(int(term))
        if term.is_Number:
            return algebra.constant(float(term))
        if term.is_Symbol:
            return algebra.symbol(term.name)
        if isinstance(term, (sympy.Pow, sympy.Function)) and term.is_number and term.is_real:
            return algebra.constant(float(term))
        if isinstance(term, Load):
            return algebra.load(term.name, [visit(index) for index in term.indices])
        if isinstance(term, sympy.Pow):
            return power(term)
        if isinstance(term, Table):
            return table(visit(term.index), term.values, int if term.is_integer else float)
        if (chain := CHAINS.get(type(term))) is not None:
            return reduce(lambda x, y: algebra.call(chain, x, y), [visit(arg) for arg in term.args])
        if (name := OPERATIONS.get(type(term))) is not None:
            return algebra.call(name, *[visit(arg) for arg in term.args])
        raise UnknownOperation(f"no target can compute {type(term).__name__} in {expression}")

    def table(index, values, kind, first=0):
        """A binary search by ``where``, so that no target needs tables. ``first``: the index of the first value."""
        if len(set(values)) == 1:
            return algebra.constant(kind(values[0]))
        half = len(values) // 2
        low, high = table(index, values[:half], kind, first), table(index, values[half:], kind, first + half)
        return algebra.call("where", algebra.call("lt", index, algebra.constant(first + half)), low, high)

    def power(term):
        base, exponent = term.args
        if base == sympy.E:
            return algebra.call("exp", visit(exponent))
        if (2 * exponent).is_Integer and abs(exponent) <= HIGHEST_POWER:
            whole, rest = divmod(abs(int(2 * exponent)), 2)
            factors = [visit(base)] * whole + ([algebra.call("sqrt", visit(base))] if rest else [])
            product = reduce(lambda x, y: algebra.call("mul", x, y), factors)
            return product if exponent > 0 else algebra.call("div", algebra.constant(1.0), product)
        if base.is_number and base.is_positive:
            power_of_two = (
                visit(exponent)
                if base == 2
                else algebra.call("mul", algebra.constant(float(sympy.log(base, 2))), visit(exponent))
            )
            return algebra.call("exp2", power_of_two)
        raise UnknownOperation(f"no target can compute the power {term}")

    return visit(sympy.sympify(expression))


class Integers:
    """Python integers, for tile bounds on the host."""

    TABLE: ClassVar[dict[str, Callable[..., Any]]] = {
        "add": operator.add,
        "mul": operator.mul,
        "min": min,
        "max": max,
        "abs": abs,
        "group": lambda x: x,
        "floordiv": operator.floordiv,
        "mod": operator.mod,
        "bit_and": operator.and_,
        "bit_or": operator.or_,
        "bit_xor": operator.xor,
        "le": operator.le,
        "lt": operator.lt,
        "ge": operator.ge,
        "gt": operator.gt,
        "eq": operator.eq,
        "ne": operator.ne,
        "not": operator.not_,
        "and": lambda x, y: x and y,
        "or": lambda x, y: x or y,
        "where": lambda condition, x, y: x if condition else y,
        "is_power_of_two": lambda x: x > 0 and x & (x - 1) == 0,
    }

    def __init__(self, symbols: dict[str, int], captures: Any = None):
        self.symbols = symbols
        self.captures = captures

    def constant(self, value):
        return value

    def symbol(self, name):
        return self.symbols[name]

    def load(self, name, indices):
        return self.captures(name, indices)

    def call(self, operation, *args):
        return self.TABLE[operation](*args)

"""Interval arithmetic on expressions, an algebra for :func:`effattn.ir.fold.fold`.

Integers have exact bounds of type int; bounds of floats are as exact as Python's floats. Unknown bounds are infinite.
An interval always contains every value that its expression can take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

from effattn.ir.fold import UnknownOperation, fold

INFINITY = math.inf


class Interval(NamedTuple):
    """The closed interval from ``low`` to ``high``."""

    low: int | float
    high: int | float

    def within(self, other: Interval) -> bool:
        return other.low <= self.low and self.high <= other.high

    def joined(self, *others: Interval) -> Interval:
        """The smallest interval that contains all of them."""
        every = (self, *others)
        return Interval(min(each.low for each in every), max(each.high for each in every))

    @property
    def size(self) -> int | float:
        """The largest absolute value."""
        return max(abs(self.low), abs(self.high))


UNKNOWN = Interval(-INFINITY, INFINITY)
TRUTH = Interval(0, 1)
INT32 = Interval(-(2**31), 2**31 - 1)
INT64 = Interval(-(2**63), 2**63 - 1)
# values of an element of an integer tensor, by dtype
INTEGERS: dict[str, Interval] = {
    "bool": TRUTH,
    **{f"int{bits}": Interval(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": Interval(0, 2**bits - 1) for bits in (8, 16, 32, 64)},
}


def around(size: int | float) -> Interval:
    """The interval [-size, size]."""
    return Interval(-size, size)


def _ends(function: Callable[[Any, Any], Any]) -> Callable[[Interval, Interval], Interval]:
    """Lift a function of two numbers whose extremes lie at the bounds of its arguments."""

    def found(x: Interval, y: Interval) -> Interval:
        values = [function(one, other) for one, other in product(x, y)]
        return Interval(min(values), max(values))

    return found


def _times(x, y):
    return 0 if x == 0 or y == 0 else x * y


def _over(x, y):
    return _times(x, 1 / y) if abs(y) != INFINITY else 0.0


def _divided(x: Interval, y: Interval) -> Interval:
    return UNKNOWN if y.low <= 0 <= y.high else _ends(_over)(x, y)


def _floor_divided(x: Interval, y: Interval) -> Interval:
    if y.low <= 0:
        return UNKNOWN
    if not all(isinstance(end, int) for end in (*x, *y)):
        return Interval(min(x.low, 0), max(x.high, 0))
    return _ends(lambda one, other: one // other)(x, y)


def _remainder(x: Interval, y: Interval) -> Interval:
    if y.low <= 0:
        return UNKNOWN
    return x if x.low >= 0 and x.high < y.low else Interval(0, y.high - 1)


def _absolute(x: Interval) -> Interval:
    return x if x.low >= 0 else Interval(0 if x.high > 0 else -x.high, x.size)


def _rising(function: Callable[[Any], Any]) -> Callable[[Interval], Interval]:
    def found(x: Interval) -> Interval:
        return Interval(function(x.low), function(x.high))

    return found


def _bits(x: Interval, y: Interval) -> Interval:
    if not all(isinstance(end, int) for end in (*x, *y)):
        return UNKNOWN
    most = 1 << max(int(end).bit_length() for end in (*x, *y))
    return Interval(0 if min(x.low, y.low) >= 0 else -most, most - 1)


def _exp(x):
    try:
        return math.exp(x)
    except OverflowError:
        return INFINITY


def _log(x):
    return -INFINITY if x <= 0 else math.log(x)


def _sqrt(x):
    return math.sqrt(max(x, 0))


def _sign(x):
    return (x > 0) - (x < 0)


def _truth(*args: Interval) -> Interval:
    return TRUTH


TABLE: dict[str, Callable[..., Interval]] = {
    "add": lambda x, y: Interval(x.low + y.low, x.high + y.high),
    "mul": _ends(_times),
    "div": _divided,
    "min": lambda x, y: Interval(min(x.low, y.low), min(x.high, y.high)),
    "max": lambda x, y: Interval(max(x.low, y.low), max(x.high, y.high)),
    "abs": _absolute,
    "group": lambda x: x,
    "floordiv": _floor_divided,
    "mod": _remainder,
    "where": lambda condition, x, y: x.joined(y),
    "tanh": _rising(math.tanh),
    "exp": _rising(_exp),
    "exp2": _rising(lambda x: _exp(x * math.log(2))),
    **dict.fromkeys(("sin", "cos"), lambda x: around(1)),
    **dict.fromkeys(("bit_and", "bit_or", "bit_xor"), _bits),
    "log": _rising(_log),
    "sqrt": _rising(_sqrt),
    "sign": _rising(_sign),
    **dict.fromkeys(("le", "lt", "ge", "gt", "eq", "ne", "and", "or", "not", "is_power_of_two"), _truth),
}


class Intervals:
    """The algebra; two functions give the intervals of symbols and loads by name."""

    def __init__(self, symbol: Callable[[str], Interval], load: Callable[[str], Interval]):
        self._symbol = symbol
        self._load = load

    def constant(self, value: int | float | bool) -> Interval:
        value = int(value) if isinstance(value, bool) else value
        return UNKNOWN if value != value else Interval(value, value)

    def symbol(self, name: str) -> Interval:
        return self._symbol(name)

    def load(self, name: str, indices: Sequence[Any]) -> Interval:
        return self._load(name)

    def call(self, operation: str, *args: Interval) -> Interval:
        found = TABLE[operation](*args)
        return UNKNOWN if any(end != end for end in found) else found


def interval(term: Any, symbol: Callable[[str], Interval], load: Callable[[str], Interval]) -> Interval:
    """The interval of ``term``; :data:`UNKNOWN` if it contains an operation that no target computes."""
    try:
        return fold(term, Intervals(symbol, load))
    except UnknownOperation:
        return UNKNOWN

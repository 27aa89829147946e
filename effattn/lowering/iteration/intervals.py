"""Interval arithmetic on blocks of queries and keys: an algebra over another algebra.

In it the value of a number is a :class:`Range`, which contains it for every query and key of a pair of blocks, and that
of a condition a :class:`Truth`: may it hold for some pair, does it hold for all. The ends are values of the algebra
below: Triton source in kernels, tensors in ATen. So both compute the same, and what neither can say is "perhaps".

Kernels test conditions in float32, and compilers may fuse a product with a sum, so what was computed in floating point
is widened by more than such a rounding. An end that is NaN says that nothing is known, not even that it is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

from effattn.ir import bounds
from effattn.ir.bounds import INT64, TRUTH, UNKNOWN, Interval, around
from effattn.ir.fold import Algebra

MOST_READ = 16  # elements of a captured tensor that are read for one pair of blocks
SAFE = 2**61  # sums of such integers fit into int64
ROUNDING = 2.0**-20  # relative, of one floating point operation
OF_FUNCTION = 2.0**-12  # of exp, tanh, ... on any device
TINY = 1e-30
LARGEST = 3.0e38


@dataclass(frozen=True)
class Range:
    """A number between ``low`` and ``high``; exactly ``low`` if both are the same object."""

    low: Any
    high: Any
    kind: str = "int"  # or "float"
    bounds: Interval = INT64  # of an integer, known beforehand
    number: int | float | None = None  # of a constant
    span: int | None = None  # high - low is at most this
    aligned: int = 0  # low is a multiple of this, and high - low less

    @property
    def exact(self) -> bool:
        return self.low is self.high


@dataclass(frozen=True)
class Truth:
    """A condition: whether it holds for ``some`` pair (or may), and for ``every`` pair (surely)."""

    some: Any
    every: Any

    @property
    def exact(self) -> bool:
        return self.some is self.every


class BlockAlgebra:
    """The algebra whose values are ranges and truths."""

    def __init__(
        self,
        below: Algebra,
        ranges: Mapping[str, Range],
        load: Callable[[str, Sequence[Range]], Range],
        symbol_bounds: Interval,
    ):
        """
        Args:
            below: computes the ends.
            ranges: of the symbols that are not the same for all pairs: ``q`` and ``k``.
            load: the range of an element of a captured tensor.
            symbol_bounds: of all other integer symbols.
        """
        self.below, self.ranges, self.read, self.symbol_bounds = below, ranges, load, symbol_bounds
        self.do = below.call

    def constant(self, value):
        found = self.below.constant(value)
        if isinstance(value, bool):
            return Truth(found, found)
        if isinstance(value, int):
            return Range(found, found, "int", Interval(value, value), value, 0)
        return Range(found, found, "float", number=value, span=0)

    def symbol(self, name):
        if name in self.ranges:
            return self.ranges[name]
        found = self.below.symbol(name)
        kind = "float" if isinstance(found, float) or getattr(found, "kind", "int") == "float" else "int"
        return Range(found, found, kind, self.symbol_bounds, span=0)

    def load(self, name, indices):
        return self.read(name, indices)

    def call(self, operation, *args):
        if operation == "group":
            return args[0]
        if operation in CONDITIONS:
            return CONDITIONS[operation](self, *args)
        floats = any(isinstance(arg, Range) and arg.kind == "float" for arg in args)
        if floats or operation in OF_FLOATS:
            return self._finite(operation, args, FLOATS.get(operation, _unknown_float)(self, *args))
        numbers = [arg for arg in args if isinstance(arg, Range)]
        known = bounds.TABLE[operation](*(arg.bounds if isinstance(arg, Range) else TRUTH for arg in args))
        if all(arg.exact for arg in args) and known.within(INT64) and all(map(_safe, numbers)):
            value = self.do(operation, *(arg.low if isinstance(arg, Range) else arg.some for arg in args))
            return Range(value, value, "int", known, span=0)
        found = INTEGERS[operation](self, *args)
        tighter = Interval(max(found.bounds.low, known.low), min(found.bounds.high, known.high))
        return replace(found, bounds=tighter if known.within(INT64) else found.bounds)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def least(self, *values):
        return self._chain("min", values)

    def most(self, *values):
        return self._chain("max", values)

    def _chain(self, operation, values):
        found = values[0]
        for value in values[1:]:
            found = found if value is found else self.do(operation, found, value)
        return found

    def unknown(self, within: Interval = INT64) -> Range:
        """Any integer of an interval."""
        low, high = (self.below.constant(int(end)) for end in within)
        return Range(low, high, "int", within)

    def unknown_float(self) -> Range:
        nan = self.below.constant(float("nan"))
        return Range(nan, nan, "float")

    def where_safe(self, args: Sequence[Range], found: Range, limit: int = SAFE) -> Range:
        """``found``, or unknown where an end of ``args`` is so large that the operation may not fit into int64."""
        for arg in args:
            if arg.bounds.within(around(limit)):
                continue
            inside = self.do(
                "and",
                self.do("ge", arg.low, self.below.constant(-limit)),
                self.do("le", arg.high, self.below.constant(limit)),
            )
            nothing = self.unknown()
            low, high = (
                self.do("where", inside, found.low, nothing.low),
                self.do("where", inside, found.high, nothing.high),
            )
            found = Range(low, high, "int")
        return found

    def _finite(self, operation, args, found: Range) -> Range:
        """Widen what was rounded; NaN if an end of it or of an argument is not finite."""
        low, high = found.low, found.high
        floats = [arg for arg in args if isinstance(arg, Range)]
        if operation not in UNROUNDED:
            size = self._sizes(floats) if operation == "add" else self._sizes([found])
            by = OF_FUNCTION if operation in FUNCTIONS else ROUNDING
            margin = self.do("add", self.do("mul", size, self.below.constant(by)), self.below.constant(TINY))
            low = self.do("add", low, self.do("mul", self.below.constant(-1.0), margin))
            high = self.do("add", high, margin)
        ends = [low, high, *(end for arg in floats if arg.kind == "float" for end in _ends(arg))]
        finite = [self.do("lt", self.do("abs", end), self.below.constant(LARGEST)) for end in ends]
        nan = self.below.constant(float("nan"))
        low, high = (self.do("where", self._chain("and", finite), end, nan) for end in (low, high))
        return Range(low, high, "float")

    def _sizes(self, ranges: Sequence[Range]):
        """The sum of the largest absolute values. Sums in another order round by no more than that."""
        sizes = [self.most(*(self.do("abs", end) for end in _ends(each))) for each in ranges]
        return self._chain("add", sizes)

    def ends(self, operation, x: Range, y: Range) -> Range:
        """Of a function of two numbers whose extremes lie at the ends of its arguments."""
        values = [self.do(operation, one, other) for one, other in product(_ends(x), _ends(y))]
        return Range(self.least(*values), self.most(*values), x.kind)


def _ends(x: Range) -> tuple:
    return (x.low,) if x.exact else (x.low, x.high)


def _safe(x: Range) -> bool:
    return x.bounds.within(around(SAFE))


# -- conditions ------------------------------------------------------------------------------------------------------


def _not(algebra: BlockAlgebra, x: Truth) -> Truth:
    if x.exact:
        value = algebra.do("not", x.some)
        return Truth(value, value)
    return Truth(algebra.do("not", x.every), algebra.do("not", x.some))


def _both(operation: str):
    def found(algebra: BlockAlgebra, x: Truth, y: Truth) -> Truth:
        some = algebra.do(operation, x.some, y.some)
        return Truth(some, some if x.exact and y.exact else algebra.do(operation, x.every, y.every))

    return found


def _compared(operation: str, opposite: str):
    """``x <= y`` or ``x < y``. No comparison with NaN holds, so "may" is asked the other way round."""

    def found(algebra: BlockAlgebra, x: Range, y: Range) -> Truth:
        every = algebra.do(operation, x.high, y.low)
        if x.exact and y.exact:
            return Truth(every, every)
        if x.kind == y.kind == "int":
            return Truth(algebra.do(operation, x.low, y.high), every)
        return Truth(algebra.do("not", algebra.do(opposite, x.low, y.high)), every)

    return found


_at_most, _below = _compared("le", "gt"), _compared("lt", "ge")


def _equal(algebra: BlockAlgebra, x: Range, y: Range) -> Truth:
    if x.exact and y.exact:
        value = algebra.do("eq", x.low, y.low)
        return Truth(value, value)
    if x.kind == y.kind == "int":
        some = algebra.do("and", algebra.do("le", x.low, y.high), algebra.do("le", y.low, x.high))
    else:
        apart = algebra.do("or", algebra.do("gt", x.low, y.high), algebra.do("gt", y.low, x.high))
        some = algebra.do("not", apart)
    return Truth(some, algebra.do("and", algebra.do("eq", x.low, y.high), algebra.do("eq", x.high, y.low)))


def _is_power_of_two(algebra: BlockAlgebra, x: Range) -> Truth:
    do, constant = algebra.do, algebra.below.constant
    if x.exact:
        value = do("is_power_of_two", x.low)
        return Truth(value, value)
    # the largest power of two that is not above the upper end: all lower bits set, less half of it
    filled = do("max", do("min", x.high, constant(2**30)), constant(0))
    for shift in (1, 2, 4, 8, 16):
        filled = do("bit_or", filled, do("floordiv", filled, constant(2**shift)))
    power = do("add", filled, do("mul", constant(-1), do("floordiv", filled, constant(2))))
    within = do("and", do("ge", power, x.low), do("ge", x.high, constant(1)))
    some = do("or", within, do("gt", x.high, constant(2**30)))
    return Truth(some, do("and", do("eq", x.low, x.high), do("is_power_of_two", x.low)))


CONDITIONS: dict[str, Callable[..., Truth]] = {
    "and": _both("and"),
    "or": _both("or"),
    "not": _not,
    "le": _at_most,
    "lt": _below,
    "ge": lambda algebra, x, y: _at_most(algebra, y, x),
    "gt": lambda algebra, x, y: _below(algebra, y, x),
    "eq": _equal,
    "ne": lambda algebra, x, y: _not(algebra, _equal(algebra, x, y)),
    "is_power_of_two": _is_power_of_two,
}


# -- integers --------------------------------------------------------------------------------------------------------


def _add(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    found = Range(algebra.do("add", x.low, y.low), algebra.do("add", x.high, y.high), x.kind, span=_sum(x, y))
    return found if "float" in (x.kind, y.kind) else algebra.where_safe((x, y), found)


def _sum(x: Range, y: Range) -> int | None:
    return None if x.span is None or y.span is None else x.span + y.span


def _multiply(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    if x.number is None and y.number is not None:
        x, y = y, x
    if isinstance(x.number, int):
        low, high = (y.low, y.high) if x.number >= 0 else (y.high, y.low)
        span = None if y.span is None else abs(x.number) * y.span
        found = Range(algebra.do("mul", x.low, low), algebra.do("mul", x.low, high), span=span)
        return algebra.where_safe((y,), found, SAFE // max(abs(x.number), 1))
    return algebra.ends("mul", x, y) if bounds.TABLE["mul"](x.bounds, y.bounds).within(INT64) else algebra.unknown()


def _extreme(operation: str):
    def found(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
        span = None if x.span is None or y.span is None else max(x.span, y.span)
        return Range(algebra.do(operation, x.low, y.low), algebra.do(operation, x.high, y.high), x.kind, span=span)

    return found


def _absolute(algebra: BlockAlgebra, x: Range) -> Range:
    minus = algebra.below.constant(-1 if x.kind == "int" else -1.0)
    of_low, of_high = algebra.do("mul", minus, x.low), algebra.do("mul", minus, x.high)
    zero = algebra.below.constant(0 if x.kind == "int" else 0.0)
    found = Range(algebra.most(x.low, of_high, zero), algebra.most(x.high, of_low), x.kind, span=x.span)
    return algebra.where_safe((x,), found) if x.kind == "int" else found


def _floor_divide(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    if not y.exact or y.bounds.low <= 0:
        return algebra.unknown()
    span: int | None = None
    if isinstance(y.number, int) and x.span is not None:
        if x.aligned and y.number % x.aligned == 0:
            span = 0
        elif x.aligned and x.aligned % y.number == 0:
            span = x.aligned // y.number - 1
        else:
            span = x.span // y.number + 1
    low = algebra.do("floordiv", x.low, y.low)
    return Range(low, low if span == 0 else algebra.do("floordiv", x.high, y.low), span=span)


def _modulo(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    if y.number is None or y.number <= 0:
        return algebra.unknown()
    quotients = (algebra.do("floordiv", end, y.low) for end in (x.low, x.high))
    one_turn = algebra.do("eq", *quotients)
    low = algebra.do("where", one_turn, algebra.do("mod", x.low, y.low), algebra.below.constant(0))
    high = algebra.do("where", one_turn, algebra.do("mod", x.high, y.low), algebra.below.constant(int(y.number) - 1))
    return Range(low, high, span=int(y.number) - 1)


def _bit_and(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    x, y = (y, x) if x.number is not None else (x, y)
    if isinstance(y.number, int) and y.number >= 0 and y.number & (y.number + 1) == 0:
        return _modulo(algebra, x, algebra.constant(y.number + 1))  # of the lowest bits
    return _bits("bit_and")(algebra, x, y)


def _bits(operation: str):
    def found(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
        within = bounds.TABLE[operation](x.bounds, y.bounds)
        return algebra.unknown(within if within.within(INT64) else INT64)

    return found


def _where(algebra: BlockAlgebra, condition: Truth, x: Range, y: Range) -> Range:
    kind = "float" if "float" in (x.kind, y.kind) else "int"

    def end(one, other, extreme):
        perhaps = algebra.do("where", condition.some, extreme(one, other), other)
        return algebra.do("where", condition.every, one, perhaps)

    joined = x.bounds.joined(y.bounds)
    return Range(end(x.low, y.low, algebra.least), end(x.high, y.high, algebra.most), kind, joined)


def _sign(algebra: BlockAlgebra, x: Range) -> Range:
    return Range(algebra.do("sign", x.low), algebra.do("sign", x.high), "int", Interval(-1, 1), span=2)


INTEGERS: dict[str, Callable[..., Range]] = {
    "add": _add,
    "mul": _multiply,
    "min": _extreme("min"),
    "max": _extreme("max"),
    "abs": _absolute,
    "floordiv": _floor_divide,
    "mod": _modulo,
    "bit_and": _bit_and,
    "bit_or": _bits("bit_or"),
    "bit_xor": _bits("bit_xor"),
    "where": _where,
    "sign": _sign,
}


# -- floating point --------------------------------------------------------------------------------------------------


def _unknown_float(algebra: BlockAlgebra, *args) -> Range:
    return algebra.unknown_float()


def _rising(operation: str):
    def found(algebra: BlockAlgebra, x: Range) -> Range:
        return Range(algebra.do(operation, x.low), algebra.do(operation, x.high), "float")

    return found


def _divide(algebra: BlockAlgebra, x: Range, y: Range) -> Range:
    """By a constant only: another divisor may be zero."""
    if y.number is None or y.number == 0:
        return algebra.unknown_float()
    low, high = (x.low, x.high) if y.number > 0 else (x.high, x.low)
    return Range(algebra.do("div", low, y.low), algebra.do("div", high, y.low), "float")


FUNCTIONS = frozenset({"tanh", "exp", "exp2", "log", "sqrt", "sin", "cos"})
OF_FLOATS = FUNCTIONS | {"div"}  # floats whatever they are given
UNROUNDED = frozenset({"min", "max", "abs", "where"})
FLOATS: dict[str, Callable[..., Range]] = {
    "add": _add,
    "mul": lambda algebra, x, y: algebra.ends("mul", x, y),
    "div": _divide,
    "min": _extreme("min"),
    "max": _extreme("max"),
    "abs": _absolute,
    "where": _where,
    **{name: _rising(name) for name in ("tanh", "exp", "exp2")},
}


def few_elements(algebra: BlockAlgebra, name: str, indices: Sequence[Range], dtype: str) -> Range:
    """The range of an element of a captured tensor: of the few that the indices may mean, or of its dtype."""
    spans = [None if index.span is None else index.span + 1 for index in indices]
    floating = dtype.startswith(("float", "bfloat"))
    if None in spans or prod(spans) > MOST_READ:  # type: ignore[arg-type]
        return algebra.unknown_float() if floating else algebra.unknown(_of(dtype))
    places = [_places(algebra, index, span) for index, span in zip(indices, spans, strict=True)]  # type: ignore[arg-type]
    values = [algebra.below.load(name, list(place)) for place in product(*places)]
    if len(values) == 1:
        (value,) = values
        return Range(value, value, "float" if floating else "int", _of(dtype), span=0)
    low, high = algebra.least(*values), algebra.most(*values)
    if not floating:
        return Range(low, high, "int", _of(dtype))
    # minimum and maximum need not hand on what is not a number
    numbers = algebra._chain("and", [algebra.do("eq", value, value) for value in values])
    nan = algebra.below.constant(float("nan"))
    return Range(algebra.do("where", numbers, low, nan), algebra.do("where", numbers, high, nan), "float")


def _places(algebra: BlockAlgebra, index: Range, count: int) -> list:
    if count == 1:
        return [index.low]
    steps = [algebra.do("add", index.low, algebra.below.constant(step)) for step in range(1, count)]
    return [index.low, *(algebra.do("min", step, index.high) for step in steps)]


def _of(dtype: str) -> Interval:
    found = bounds.INTEGERS.get(dtype, UNKNOWN)
    return found if found.within(INT64) else INT64

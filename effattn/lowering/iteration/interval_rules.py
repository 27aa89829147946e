"""What each operation does to ranges and truths, in three tables: conditions, integers, floats."""

from __future__ import annotations

from collections.abc import Callable

from effattn.ir import bounds
from effattn.ir.bounds import INT64, Interval
from effattn.lowering.iteration.ranges import SAFE, Range, Ranges, Truth

# -- conditions ------------------------------------------------------------------------------------------------------


def _not(algebra: Ranges, x: Truth) -> Truth:
    if x.exact:
        value = algebra.do("not", x.some)
        return Truth(value, value)
    return Truth(algebra.do("not", x.every), algebra.do("not", x.some))


def _both(operation: str):
    def found(algebra: Ranges, x: Truth, y: Truth) -> Truth:
        some = algebra.do(operation, x.some, y.some)
        return Truth(some, some if x.exact and y.exact else algebra.do(operation, x.every, y.every))

    return found


def _compared(operation: str, opposite: str):
    """``x <= y`` or ``x < y``. No comparison with NaN holds, so "may" is asked the other way round."""

    def found(algebra: Ranges, x: Range, y: Range) -> Truth:
        every = algebra.do(operation, x.high, y.low)
        if x.exact and y.exact:
            return Truth(every, every)
        if x.kind == y.kind == "int":
            return Truth(algebra.do(operation, x.low, y.high), every)
        return Truth(algebra.do("not", algebra.do(opposite, x.low, y.high)), every)

    return found


_at_most, _below = _compared("le", "gt"), _compared("lt", "ge")


def _equal(algebra: Ranges, x: Range, y: Range) -> Truth:
    if x.exact and y.exact:
        value = algebra.do("eq", x.low, y.low)
        return Truth(value, value)
    if x.kind == y.kind == "int":
        some = algebra.do("and", algebra.do("le", x.low, y.high), algebra.do("le", y.low, x.high))
    else:
        apart = algebra.do("or", algebra.do("gt", x.low, y.high), algebra.do("gt", y.low, x.high))
        some = algebra.do("not", apart)
    return Truth(some, algebra.do("and", algebra.do("eq", x.low, y.high), algebra.do("eq", x.high, y.low)))


def _is_power_of_two(algebra: Ranges, x: Range) -> Truth:
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


def _add(algebra: Ranges, x: Range, y: Range) -> Range:
    found = Range(algebra.do("add", x.low, y.low), algebra.do("add", x.high, y.high), x.kind, span=_sum(x, y))
    return found if "float" in (x.kind, y.kind) else algebra.where_safe((x, y), found)


def _sum(x: Range, y: Range) -> int | None:
    return None if x.span is None or y.span is None else x.span + y.span


def _multiply(algebra: Ranges, x: Range, y: Range) -> Range:
    if x.number is None and y.number is not None:
        x, y = y, x
    if isinstance(x.number, int):
        low, high = (y.low, y.high) if x.number >= 0 else (y.high, y.low)
        span = None if y.span is None else abs(x.number) * y.span
        found = Range(algebra.do("mul", x.low, low), algebra.do("mul", x.low, high), span=span)
        return algebra.where_safe((y,), found, SAFE // max(abs(x.number), 1))
    return algebra.ends("mul", x, y) if bounds.TABLE["mul"](x.bounds, y.bounds).within(INT64) else algebra.unknown()


def _extreme(operation: str):
    def found(algebra: Ranges, x: Range, y: Range) -> Range:
        span = None if x.span is None or y.span is None else max(x.span, y.span)
        return Range(algebra.do(operation, x.low, y.low), algebra.do(operation, x.high, y.high), x.kind, span=span)

    return found


def _absolute(algebra: Ranges, x: Range) -> Range:
    minus = algebra.below.constant(-1 if x.kind == "int" else -1.0)
    of_low, of_high = algebra.do("mul", minus, x.low), algebra.do("mul", minus, x.high)
    zero = algebra.below.constant(0 if x.kind == "int" else 0.0)
    found = Range(algebra.most(x.low, of_high, zero), algebra.most(x.high, of_low), x.kind, span=x.span)
    return algebra.where_safe((x,), found) if x.kind == "int" else found


def _floor_divide(algebra: Ranges, x: Range, y: Range) -> Range:
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


def _modulo(algebra: Ranges, x: Range, y: Range) -> Range:
    if y.number is None or y.number <= 0:
        return algebra.unknown()
    quotients = (algebra.do("floordiv", end, y.low) for end in (x.low, x.high))
    one_turn = algebra.do("eq", *quotients)
    low = algebra.do("where", one_turn, algebra.do("mod", x.low, y.low), algebra.below.constant(0))
    high = algebra.do("where", one_turn, algebra.do("mod", x.high, y.low), algebra.below.constant(int(y.number) - 1))
    return Range(low, high, span=int(y.number) - 1)


def _bit_and(algebra: Ranges, x: Range, y: Range) -> Range:
    x, y = (y, x) if x.number is not None else (x, y)
    if isinstance(y.number, int) and y.number >= 0 and y.number & (y.number + 1) == 0:
        return _modulo(algebra, x, algebra.constant(y.number + 1))  # of the lowest bits
    return _bits("bit_and")(algebra, x, y)


def _bits(operation: str):
    def found(algebra: Ranges, x: Range, y: Range) -> Range:
        within = bounds.TABLE[operation](x.bounds, y.bounds)
        return algebra.unknown(within if within.within(INT64) else INT64)

    return found


def _where(algebra: Ranges, condition: Truth, x: Range, y: Range) -> Range:
    kind = "float" if "float" in (x.kind, y.kind) else "int"

    def end(one, other, extreme):
        perhaps = algebra.do("where", condition.some, extreme(one, other), other)
        return algebra.do("where", condition.every, one, perhaps)

    joined = x.bounds.joined(y.bounds)
    return Range(end(x.low, y.low, algebra.least), end(x.high, y.high, algebra.most), kind, joined)


def _sign(algebra: Ranges, x: Range) -> Range:
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


def unknown_float_of(algebra: Ranges, *args) -> Range:
    return algebra.unknown_float()


def _rising(operation: str):
    def found(algebra: Ranges, x: Range) -> Range:
        return Range(algebra.do(operation, x.low), algebra.do(operation, x.high), "float")

    return found


def _divide(algebra: Ranges, x: Range, y: Range) -> Range:
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

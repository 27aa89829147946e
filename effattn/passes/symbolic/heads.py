"""Heads in several dimensions: in ``[B, blocks, len, H, D]``, head ``block * H + head`` of one attention.

Each such dimension is indexed by a digit of the head index, ``(h // divisor) % size``. The same holds for head_dim if
the product sums over several dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import sympy

from effattn.ir import expr
from effattn.ir.expr import h


class Digit(NamedTuple):
    """``(number // divisor) % size``; without the modulo if size is None."""

    divisor: int
    size: int | None


def digits_of(number: Any, sizes: Sequence[Any]) -> list[Any]:
    """The digits of ``number`` for ``sizes``, slowest first. All sizes except the first must be integers."""
    found: list[Any] = []
    rest: Any = number
    for place, size in reversed(list(enumerate(sizes))):
        if place == 0:
            found.append(rest)
        elif size == 1:
            found.append(sympy.Integer(0))
        else:
            found.append(expr.Modulo(rest, size))
            rest = expr.FloorDiv(rest, size)
    return found[::-1]


def digit(entry: Any, number: Any = h) -> Digit | None:
    """``entry`` as a digit of ``number`` (by default the head index); None if it is not one."""
    if entry == number:
        return Digit(1, None)
    if not isinstance(entry, (expr.FloorDiv, expr.Modulo)) or not entry.args[1].is_Integer:
        return None
    inner, size = digit(entry.args[0], number), int(entry.args[1])
    if inner is None or (inner.size is not None and inner.size % size):
        return None
    if isinstance(entry, expr.Modulo):
        return Digit(inner.divisor, size)
    return Digit(inner.divisor * size, None if inner.size is None else inner.size // size)


def in_steps(entry: Any) -> tuple[Digit, int, int] | None:
    """(digit, first, step) of ``first + step * digit``; None for any other term."""
    first, rest = sympy.sympify(entry).as_coeff_Add()
    step, inner = rest.as_coeff_Mul()
    part = digit(inner)
    if part is None or not (first.is_Integer and step.is_Integer and first >= 0 and step > 0):
        return None
    return part, int(first), int(step)


def how_many(part: Digit, heads: Any) -> int | None:
    """The number of values of a digit of a number below ``heads``; None if unknown."""
    if part.size is not None:
        return part.size
    count = sympy.sympify(heads) / part.divisor
    return int(count) if count.is_Integer else None


def sizes_of(digits: Sequence[Digit], limit: Any) -> tuple[int, ...]:
    """The number of values of each of ``digits``, which in this order make up a number below ``limit``."""
    above = [int(limit), *(part.divisor for part in digits)]
    return tuple(outer // inner for outer, inner in pairwise(above))


def in_order(digits: Sequence[Digit], limit: Any) -> list[int] | None:
    """The order of ``digits`` from slowest to fastest; None if they do not make up ``number // smallest divisor``.

    ``limit`` is the exclusive upper bound of the number.
    """
    order = sorted(range(len(digits)), key=lambda place: -digits[place].divisor)
    above = sympy.sympify(limit)
    for number, place in enumerate(order):
        divisor, size = digits[place]
        if size is None:
            if number > 0:
                return None
        elif divisor * size != above:
            return None
        above = sympy.Integer(divisor)
    return order

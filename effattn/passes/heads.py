"""Heads that lie in several dimensions: ``[B, blocks, len, H, D]`` has the head ``block * H + head`` of one attention.

Each of the dimensions is indexed by one digit of the head's number, ``(h // divisor) % size``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sympy

from effattn.ir import expr
from effattn.ir.expr import h


class Digit(NamedTuple):
    """``(h // divisor) % size``; a size of None: all of the rest."""

    divisor: int
    size: int | None


def digit(entry: Any) -> Digit | None:
    """The digit of the head's number that ``entry`` is; None if it is anything else."""
    if entry == h:
        return Digit(1, None)
    if not isinstance(entry, (expr.FloorDiv, expr.Modulo)) or not entry.args[1].is_Integer:
        return None
    inner, number = digit(entry.args[0]), int(entry.args[1])
    if inner is None or (inner.size is not None and inner.size % number):
        return None
    if isinstance(entry, expr.Modulo):
        return Digit(inner.divisor, number)
    return Digit(inner.divisor * number, None if inner.size is None else inner.size // number)


def in_steps(entry: Any) -> tuple[Digit, int, int] | None:
    """(digit, first, step) of ``first + step * digit``; None if ``entry`` is anything else."""
    first, rest = sympy.sympify(entry).as_coeff_Add()
    step, inner = rest.as_coeff_Mul()
    part = digit(inner)
    if part is None or not (first.is_Integer and step.is_Integer and first >= 0 and step > 0):
        return None
    return part, int(first), int(step)


def how_many(part: Digit, heads: Any) -> int | None:
    """How many values a digit of a number below ``heads`` takes; None if that is not known."""
    if part.size is not None:
        return part.size
    count = sympy.sympify(heads) / part.divisor
    return int(count) if count.is_Integer else None


def in_order(digits: list[Digit], heads: Any) -> list[int] | None:
    """Places of ``digits``, the slowest varying first; None if together they are not ``h // smallest divisor``."""
    order = sorted(range(len(digits)), key=lambda place: -digits[place].divisor)
    above = sympy.sympify(heads)
    for number, place in enumerate(order):
        divisor, size = digits[place]
        if size is None:
            if number > 0:
                return None
        elif divisor * size != above:
            return None
        above = sympy.Integer(divisor)
    return order

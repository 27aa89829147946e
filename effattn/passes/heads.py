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

"""The size a score may be expected to have. A fill must be lower than that to hide a key.

And which large numbers may become infinite, or have exponentials of 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, Intervals, around
from effattn.ir.expr import Where
from effattn.ir.fold import UnknownOperation, fold

LOWEST = 3.4028234663852886e38  # -finfo(float32).min
VANISHES = -64.0  # next to scores of a few units, the exp of a lower score is 0 or is lost by rounding


@dataclass(frozen=True)
class Sizes:
    """Assumed sizes of the parts of a score."""

    product: float  # query . key
    data: float  # captured tensors: a bias, a slope, a temperature; and the inverse of a divisor
    count: int  # positions, lengths


IN_FLOAT32 = Sizes(30_000.0, 16.0, 2**20)
IN_HALF = Sizes(8192.0, 1.0, 8192)  # beside float16's lowest fill, since float16 holds no larger scores


def plausible(score: Any, *, in_half: bool) -> Interval:
    """The interval of a score with captured tensors of usual size."""
    sizes = IN_HALF if in_half else IN_FLOAT32
    whole = {symbol.name for symbol in score.free_symbols if symbol.is_integer}
    whole |= {load.name for load in expr.loads_of(score) if isinstance(load, expr.IntLoad)}

    def size(name: str) -> Interval:
        return around(sizes.product if name == expr.s.name else sizes.count if name in whole else sizes.data)

    try:
        return fold(score, _Plausible(size, around(sizes.data)))
    except UnknownOperation:
        return UNKNOWN


class _Plausible(Intervals):
    """A divisor whose interval contains 0 is assumed to be a captured tensor, not close to 0."""

    def __init__(self, size, inverse: Interval):
        super().__init__(size, size)
        self.inverse = inverse

    def call(self, operation: str, *args: Interval) -> Interval:
        if operation == "div" and args[1].low <= 0 <= args[1].high:
            return super().call("mul", args[0], self.inverse)
        return super().call(operation, *args)


@dataclass(frozen=True)
class Chosen:
    """A number, such as a fill, that a ``where`` puts into a score where ``unless`` does not hold."""

    number: float
    unless: Any
    factor: float = 1.0  # product of the constants that it is multiplied by
    most: float = 1.0  # largest factor on its way, by constants and data
    positive: bool = True  # whether all of its factors are known to be positive


def chosen(score, outer: Chosen | None = None) -> list[Chosen]:
    """The numbers that ``where`` puts into a score, except inside functions. ``outer``: the factors of ``score``."""
    outer = Chosen(0.0, sympy.true) if outer is None else outer
    if isinstance(score, Where):
        condition, *branches = score.args
        found: list[Chosen] = []
        for branch, unless in zip(branches, (sympy.Not(condition), condition), strict=True):
            if not branch.is_number:
                found += chosen(branch, outer)
            elif branch.is_finite:
                found.append(replace(outer, number=float(branch), unless=unless))
        return found
    if not isinstance(score, (sympy.Mul, sympy.Add, expr.Group, sympy.Max, sympy.Min, sympy.Abs)):
        return []
    held = [arg for arg in score.args if arg.has(Where)]
    if isinstance(score, sympy.Mul):
        rest = [arg for arg in score.args if not arg.has(Where)]
        numbers = math.prod(float(arg) for arg in rest if arg.is_number)
        most = math.prod(max(1.0, plausible(arg, in_half=False).size) for arg in rest)
        positive = outer.positive and len(held) == 1 and all(arg.is_positive is True for arg in rest)
        outer = replace(outer, factor=outer.factor * numbers, most=outer.most * most, positive=positive)
    elif isinstance(score, sympy.Abs):
        outer = replace(outer, positive=False)
    elif isinstance(score, sympy.Add) and (outer.most > 1 or any(arg.as_coeff_Mul()[0] != 1 for arg in held)):
        outer = replace(outer, most=outer.most * len(held))  # (x + y) / 2 reads as x / 2 + y / 2
    return [one for arg in held for one in chosen(arg, outer)]


def not_overflowing(score) -> list[Any]:
    """Conditions under which a score has no number that becomes infinite in some order of its products and sums.

    A term does not have the order in which user code multiplies: the lowest float times two, times a half, is -inf, but
    times one it is finite. Both hide a key from the softmax. False: it may become +inf, which hides the other keys.
    """
    large = [one for one in chosen(score) if one.most > 1 and abs(one.number) * one.most > LOWEST]
    return [one.unless if one.positive and one.number < 0 else sympy.false for one in large]


def not_vanishing(score) -> list[Any]:
    """Conditions under which a score has no number whose exp is 0 or negligible. False: the exp may be infinite."""
    far = [one for one in chosen(score) if abs(one.number * one.factor) > -VANISHES]
    return [one.unless if one.positive and one.number < 0 else sympy.false for one in far]

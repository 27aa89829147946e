"""The size a score may be expected to have. A fill must be lower than that to hide a key.

And which large numbers may become infinite, or have exponentials of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, Intervals, around
from effattn.ir.expr import Where
from effattn.ir.fold import UnknownOperation, fold

LOWEST = 3.4028234663852886e38  # -finfo(float32).min


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


def not_overflowing(score, factor: float = 1.0, positive: bool = True) -> list[Any]:
    """Where a score keeps clear of numbers that become infinite on the way, in some order of its products and sums.

    A term does not tell in which order the author multiplies: the lowest float times two, times a half, is -inf, and
    times one it is not. Both hide a key beside others. False: it may become plus infinity, which hides the others.

    Args:
        factor: at most what ``score`` is multiplied by on the way.
        positive: whether that is known to be positive.
    """
    if isinstance(score, Where):
        condition, *branches = score.args
        found = []
        for branch, seen in zip(branches, (sympy.Not(condition), condition), strict=True):
            if not branch.is_number:
                found += not_overflowing(branch, factor, positive)
            elif branch.is_finite and factor > 1 and abs(float(branch)) * factor > LOWEST:
                found.append(seen if positive and branch < 0 else sympy.false)
        return found
    if isinstance(score, sympy.Mul):
        held = [arg for arg in score.args if arg.has(Where)]
        rest = [arg for arg in score.args if not arg.has(Where)]
        for arg in rest:
            factor *= max(1.0, plausible(arg, in_half=False).size)
        positive = positive and len(held) == 1 and all(arg.is_positive is True for arg in rest)
        return [condition for arg in held for condition in not_overflowing(arg, factor, positive)]
    if isinstance(score, (sympy.Add, expr.Group, sympy.Max, sympy.Min, sympy.Abs)):
        held = [arg for arg in score.args if arg.has(Where)]
        if isinstance(score, sympy.Add) and (factor > 1 or any(arg.as_coeff_Mul()[0] != 1 for arg in held)):
            factor *= len(held)  # (x + y) / 2 reads as x / 2 + y / 2
        return [condition for arg in held for condition in not_overflowing(arg, factor, positive)]
    return []

"""How large a score may be expected to be: what a fill has to lie below so that it hides a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, Intervals, around
from effattn.ir.fold import UnknownOperation, fold


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a score are taken to be."""

    product: float  # query . key
    data: float  # a bias, a slope, a temperature; and what dividing by one multiplies with
    count: int  # positions, lengths


IN_FLOAT32 = Sizes(30_000.0, 16.0, 2**20)
IN_HALF = Sizes(8192.0, 1.0, 8192)  # beside a fill of float16, which holds no larger ones


def plausible(score: Any, *, in_half: bool) -> Interval:
    """Between which numbers a score lies, if its data are of a usual size."""
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
    """Divisors that may be 0 are data, and not that small."""

    def __init__(self, size, inverse: Interval):
        super().__init__(size, size)
        self.inverse = inverse

    def call(self, operation: str, *args: Interval) -> Interval:
        if operation == "div" and args[1].low <= 0 <= args[1].high:
            return super().call("mul", args[0], self.inverse)
        return super().call(operation, *args)

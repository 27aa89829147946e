"""The size a score may be expected to have. A fill must be lower than that to hide a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, Intervals, around
from effattn.ir.fold import UnknownOperation, fold


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

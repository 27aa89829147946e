"""What intervals say of a pair of blocks: a number's range, a condition's truth; and what rules need of an algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from effattn.ir.bounds import INT64, Interval, around
from effattn.ir.fold import Algebra

SAFE = 2**61  # sums of such integers fit into int64


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


class Ranges(Protocol):
    """The algebra of ranges, as its rules see it."""

    below: Algebra

    def do(self, operation: str, *args: Any) -> Any: ...
    def constant(self, value: int | float | bool) -> Any: ...
    def least(self, *values: Any) -> Any: ...
    def most(self, *values: Any) -> Any: ...
    def unknown(self, within: Interval = INT64) -> Range: ...
    def unknown_float(self) -> Range: ...
    def where_safe(self, args: Sequence[Range], found: Range, limit: int = SAFE) -> Range: ...
    def ends(self, operation: str, x: Range, y: Range) -> Range: ...


def ends_of(x: Range) -> tuple:
    return (x.low,) if x.exact else (x.low, x.high)


def is_safe(x: Range) -> bool:
    return x.bounds.within(around(SAFE))

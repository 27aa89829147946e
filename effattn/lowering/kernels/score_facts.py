"""What kernels know of a score: that it is a multiple of ``s``, how large it may be, where it reads learned tensors.

In the backward, an element of a captured tensor that depends on the query alone (a temperature, a slope for each head)
is summed up by the program of a tile of queries, one that depends on the key alone by that of a tile of keys. Both
write a number for each query or key of each head, which the caller adds up. One that depends on the distance of query
and key is summed up by a kernel whose programs go along the diagonals of tiles. An element for each pair is stored, or
added where several scores read it: as a whole number of a unit that the caller finds, so that the order of the sums
does not matter and every run gives the same bits. Only where the slope is data itself are float32 numbers added, in any
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import sympy

from effattn.ir import expr
from effattn.ir.bounds import UNKNOWN, Interval, around, interval
from effattn.ir.derivative import Reads, affine_slope, reads_of
from effattn.ir.distance import of_distance
from effattn.lowering.dialects.triton.terms import NARROW
from effattn.lowering.kernels.spec import KernelSpec

Reduced = Literal["rows", "keys", "distances", "pairs"]
LARGE_LSE = 1024.0  # beyond it float32 keeps fewer than 14 bits of the logarithm of a sum


def linear_scale(score: Any, spec: KernelSpec) -> Any | None:
    """c if the score is ``c * s`` with one c per tile, so that it folds into the exponent; else None."""
    factor = sympy.expand(score).coeff(expr.s, 1)
    one_head = spec.kind in ("prefill", "listed")  # per tile
    varying = (expr.s, expr.q, expr.k) if one_head else (expr.s, expr.q, expr.k, expr.h)
    if factor.has(*varying) or (factor.is_zero is not False and factor.is_number):
        return None
    return factor if sympy.expand(score - factor * expr.s) == 0 else None


@lru_cache(maxsize=1024)
def loses_totals(score: Any) -> bool:
    """Whether a row's LSE may be so large that float32 does not keep how many keys share its greatest score.

    As in a row of nothing but the lowest float, whose weights are one over their number.
    """
    slope = affine_slope(score)
    if slope is not None and sympy.expand(score - slope * expr.s) == 0:
        return False

    def size(name: str) -> Interval:
        return around(1.0) if name == expr.s.name else NARROW

    return not interval(score, size, lambda name: UNKNOWN).within(around(LARGE_LSE))


@lru_cache(maxsize=1024)
def may_overflow(score: Any) -> bool:
    """Whether a score that is finite may be infinite when it is multiplied by log2(e).

    As the lowest float, in a captured tensor with numbers for queries or keys. Those for heads are factors of moderate
    size.
    """
    varying = {load.name for load in expr.loads_of(score) if load.has(expr.q, expr.k)}

    def size(name: str) -> Interval:
        return NARROW

    return not interval(score, size, lambda name: UNKNOWN if name in varying else NARROW).within(around(2.0**126))


@dataclass(frozen=True)
class CapturedTerm:
    """One load of a captured tensor, and how its gradient is reduced."""

    number: int
    name: str
    dtype: str
    read: Reads
    reduced: Reduced
    owned: bool

    @property
    def pointer(self) -> str:
        return f"captured_{self.number}"

    @property
    def factor(self) -> float:
        """What the caller multiplies the sums by: the slope, if it is a number and nothing is stored."""
        return 1.0 if self.owned or not self.read.slope.is_number else float(self.read.slope)

    @property
    def whole(self) -> bool:
        """Whether it is added as a whole number of units."""
        return self.reduced == "pairs" and not self.owned and bool(self.read.slope.is_number)

    @property
    def type(self) -> str:
        """The dtype of its buffer, torch's name."""
        return (
            "float32" if self.reduced != "pairs" else self.dtype if self.owned else "int64" if self.whole else "float32"
        )


def captured_terms(spec: KernelSpec) -> tuple[CapturedTerm, ...]:
    """The terms that a kernel of gradients reduces, in the order of the spec's captured tensors."""
    dtypes = {load.name: load.dtype for load in spec.attention.captures}
    found: list[CapturedTerm] = []
    for wanted in spec.wanted:
        for read in reads_of(spec.attention.score, wanted.name):
            reduced = _reduced(read.load, wanted.owned)
            if (reduced == "distances") == (spec.kind == "distances"):
                owned = wanted.owned and reduced == "pairs"
                found.append(CapturedTerm(len(found), wanted.name, dtypes[wanted.name], read, reduced, owned))
    return tuple(found)


def _reduced(load: expr.Load, owned: bool) -> Reduced:
    by_row, by_key = load.has(expr.q), load.has(expr.k)
    if by_row and by_key:
        return "pairs" if owned or of_distance(load) is None else "distances"
    return "keys" if by_key else "rows"


def may_own(score: Any, name: str) -> bool:
    """Whether each element of a captured tensor is read by one score, if the tensor has all of their dimensions."""
    reads = reads_of(score, name)
    indices = [index for read in reads for index in read.load.indices if index != 0]
    return len(reads) == 1 and set(indices) <= set(expr.INDICES) and len(set(indices)) == len(indices)

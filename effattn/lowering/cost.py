"""What a form costs, as sympy terms in Nq and Nk, and at which length which form is the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from effattn.ir.expr import Nk, Nq
from effattn.lowering.device import Device

LONGEST = 1 << 24  # keys up to which lengths are looked at
CHOICE = 48  # to choose units takes as long as to read so many bytes for each of them (2.0 ms for 134 million, H100)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes moved as sympy terms in Nq and Nk (other sizes already numbers), and kernels started."""

    flops: Any = 0
    bytes: Any = 0
    launches: int = 0

    @cached_property
    def _numbers(self) -> Callable[[int, int], tuple[float, float]]:
        return sympy.lambdify((Nq, Nk), (self.flops, self.bytes), modules="math")

    def at(self, q_len: int, k_len: int) -> tuple[float, float]:
        """(FLOPs, bytes) at these lengths."""
        flops, moved = self._numbers(q_len, k_len)
        return float(flops), float(moved)

    def seconds(self, device: Device, share: float, dtype: str, q_len: int, k_len: int) -> float:
        """Time if products run at ``share`` of the device's rate: whichever of products and memory takes longer."""
        flops, moved = self.at(q_len, k_len)
        return max(flops / (share * device.flops(dtype)), moved / device.bandwidth) + self.launches * device.launch


@dataclass(frozen=True)
class Cost:
    """Attention over what is kept, and apart from it what finding that out costs."""

    attention: Work
    selector: Work = Work()
    dense: bool = False  # runs SDPA's own kernels

    def seconds(self, device: Device, dtype: str, q_len: int, k_len: int) -> float:
        """Predicted time of one call."""
        share = device.dense if self.dense else device.generated
        selector = self.selector.seconds(device, device.scored, dtype, q_len, k_len)
        return self.attention.seconds(device, share, dtype, q_len, k_len) + selector


def pairs(kept_keys: Any) -> Any:
    """Pairs (q, k) of causal attention if a row that sees n keys keeps min(n, kept) of them; the last row sees Nk.

    The sum over rows of min(n, c), with ``kept_keys`` = c a term in Nk.
    """

    def up_to(n: Any) -> Any:
        kept = sympy.Min(n, kept_keys)
        return n * kept - kept**2 / 2

    return up_to(Nk) - up_to(Nk - Nq)


def ladder(seconds: Mapping[str, Callable[[int], float]], shortest: int = 1) -> tuple[tuple[int, str], ...]:
    """Which of several is the cheapest at which length: (first length, name), ascending from ``shortest``.

    Lengths are looked at by powers of two up to ``LONGEST``, and a change between two of them is found by bisection; of
    equal ones the first named is taken.
    """

    def best(length: int) -> str:
        return min(seconds, key=lambda name: seconds[name](length))

    steps = [(shortest, best(shortest))]
    length = shortest
    while length < LONGEST:
        low, high = length, 2 * length
        while (name := best(high)) != steps[-1][1]:
            first = high
            while first - low > 1:
                middle = (low + first) // 2
                low, first = (middle, first) if best(middle) == steps[-1][1] else (low, middle)
            steps.append((first, best(first)))
            low = first
            if steps[-1][1] == name:
                break
        length = high
    return tuple(steps)

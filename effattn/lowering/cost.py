"""Costs of forms as sympy terms in Nq and Nk, and the cheapest form by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy

from effattn.ir.expr import Nk, Nq
from effattn.lowering.device import Device

LONGEST = 1 << 24  # largest number of keys that is considered
CHOICE = 48  # choosing units costs as much as reading this many bytes per unit (2.0 ms for 134 million, H100)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes moved, as sympy terms in Nq and Nk, and the number of kernel launches."""

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
        """Seconds, if matrix products run at ``share`` of the device's rate: compute or memory, whichever is slower."""
        flops, moved = self.at(q_len, k_len)
        return max(flops / (share * device.flops(dtype)), moved / device.bandwidth) + self.launches * device.launch


@dataclass(frozen=True)
class Cost:
    """Cost of attention over the kept keys, and of the selector that finds them."""

    attention: Work
    selector: Work = Work()
    dense: bool = False  # runs SDPA's kernels

    def seconds(self, device: Device, dtype: str, q_len: int, k_len: int) -> float:
        """Predicted seconds of one call."""
        share = device.dense if self.dense else device.generated
        selector = self.selector.seconds(device, device.scored, dtype, q_len, k_len)
        return self.attention.seconds(device, share, dtype, q_len, k_len) + selector


def pairs(kept_keys: Any) -> Any:
    """(q, k) pairs of causal attention where a query that sees n keys keeps min(n, ``kept_keys``); the last sees Nk.

    ``kept_keys`` is a term in Nk.
    """

    def up_to(n: Any) -> Any:
        kept = sympy.Min(n, kept_keys)
        return n * kept - kept**2 / 2

    return up_to(Nk) - up_to(Nk - Nq)


def ladder(seconds: Mapping[str, Callable[[int], float]], shortest: int = 1) -> tuple[tuple[int, str], ...]:
    """The cheapest name at each length, as (first length, name), ascending from ``shortest``.

    Powers of two up to ``LONGEST`` are compared; a change between two of them is found by bisection. Ties go to the
    name that comes first.
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

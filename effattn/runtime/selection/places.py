"""Positions of a call's query blocks among its keys, computed on the device without synchronising."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import sympy
import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.ir.plan import Plan
from effattn.lowering.iteration.tile_ranges import tile_ranges
from effattn.runtime.algebra import bindings, evaluate


@lru_cache(maxsize=4096)
def position_of(spec: AttentionSpec) -> sympy.Expr:
    """The absolute position of query q among the keys, from the causal condition ``k <= position``."""
    (upper,) = tile_ranges(spec.predicate).upper
    return sympy.expand(upper - 1)


@dataclass(frozen=True)
class Places:
    """Query blocks and key units of a call.

    ``first`` and ``last``, int64 [M], are the units that hold the positions of a block's first and last query. If no
    query of the block sees a key, ``last`` is -1 and ``first`` is 0.
    """

    first: Tensor
    last: Tensor
    blocks: int
    units: int

    @property
    def own(self) -> Tensor:
        """Number of units that hold a position of the block: int64 [M]."""
        return self.last - self.first + 1

    @property
    def eligible(self) -> Tensor:
        """Number of units that some query of the block may see: int64 [M]."""
        return self.last + 1

    def of(self, rows: slice) -> Places:
        """The places of some query blocks."""
        first, last = self.first[rows], self.last[rows]
        return Places(first, last, first.shape[0], self.units)

    def most_own(self, block: int, unit: int) -> int:
        return min((block - 1) // unit + 2, self.units)


def places_of(plan: Plan, q_len: int, k_len: int, captures, scalars, numbers, device: torch.device) -> Places:
    """The places of a call of a plan with a selector."""
    assert plan.sparsity.select is not None
    block, unit = plan.sparsity.select.expand.block, plan.sparsity.select.expand.unit
    names, tensors = bindings(plan.spec, captures, scalars, numbers)
    blocks, units = -(-q_len // block), -(-k_len // unit)
    starts = torch.arange(blocks, device=device) * block
    ends = (starts + block - 1).clamp(max=q_len - 1)

    def at(rows: Tensor) -> Tensor:
        value = evaluate(
            position_of(plan.spec), {**names, "Nq": q_len, "Nk": k_len, "q": rows}, tensors, torch.float64, device
        )
        return torch.as_tensor(value, device=device).expand(blocks).clamp(max=k_len - 1)

    first = torch.div(at(starts), unit, rounding_mode="floor").clamp(min=0)
    last = torch.div(at(ends), unit, rounding_mode="floor").clamp(min=-1)
    return Places(torch.where(last < 0, 0, first), last, blocks, units)

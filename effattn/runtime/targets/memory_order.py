"""Allocation of outputs in a plan's memory order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effattn.ir.plan import Plan


def allocate(layout: str, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [B, H, N, D] tensor in a memory order of plans, on the device and in the dtype of ``like``."""
    batch, heads, length, dim = shape
    if layout == "bnhd":
        return like.new_empty((batch, length, heads, dim), dtype=dtype).transpose(1, 2)
    return like.new_empty((batch, heads, length, dim), dtype=dtype)


def strides_of(layout: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The strides of what :func:`allocate` makes, for sizes that are known."""
    _, heads, length, dim = (max(size, 1) for size in shape)
    if layout == "bnhd":
        return length * heads * dim, dim, heads * dim, 1
    return heads * length * dim, length * dim, dim, 1


def allocate_output(plan: Plan, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out [B, Hq, Nq, Dv] in the plan's memory order and q's dtype, lse [B, Hq, Nq] float32)."""
    batch, heads, q_len, _ = query.shape
    out = allocate(plan.dispatch.layout, query, (batch, heads, q_len, value.shape[3]))
    return out, query.new_empty((batch, heads, q_len), dtype=torch.float32)

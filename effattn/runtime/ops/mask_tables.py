"""Validates a causal mask in a buffer against the triangle it held when the model was compiled.

    is_causal_buffer(table, rows, diagonal, inside, outside) -> bool, 0-d

``table`` is [..., R, C]. Row r holds ``inside`` up to column ``rows[r] + diagonal`` and ``outside`` after it. Buffers
can be written at any time, so every call validates the part that it reads, without synchronising.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.runtime.ops.registry import Op, register

SCHEMA = "(Tensor table, Tensor? rows, SymInt diagonal, Scalar inside, Scalar outside) -> Tensor"
CHANGED = (
    "a mask in a buffer of the model is no longer the triangle that it was when the model was compiled: "
    "call torch._dynamo.reset() after writing to it"
)
_AT_ONCE = 1 << 24  # most elements compared at a time


def is_causal_buffer(table: Tensor, rows: Tensor | None, diagonal: int, inside: float, outside: float) -> Tensor:
    """Whether every row is ``inside`` up to its last column and ``outside`` after it: 0-d bool."""
    height, width = table.shape[-2:]
    place = torch.arange(height, device=table.device) if rows is None else rows.to(table.device)
    column = torch.arange(width, device=table.device)
    fits = torch.ones((), dtype=torch.bool, device=table.device)
    step = max(1, _AT_ONCE // max(1, width))
    for start in range(0, height, step):
        seen = column <= place[start : start + step, None] + diagonal
        part = table[..., start : start + step, :]
        fits = fits & torch.where(seen, part == inside, part == outside).all()
    return fits


def _fake(table, rows, diagonal, inside, outside):
    return torch.empty((), dtype=torch.bool, device=table.device)


def _no_gradient(ctx, *grads):
    return None, None, None, None, None


OPS = {"is_causal_buffer": Op(SCHEMA, is_causal_buffer, _fake, _no_gradient)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

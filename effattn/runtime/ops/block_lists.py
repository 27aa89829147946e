"""The block lists of FlexAttention's block masks as a boolean table.

listed_blocks(counts, indices, full_counts, full_indices, key, block) -> listed
"""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.runtime.ops.attend import NoGradient
from effattn.runtime.ops.registry import Op, register

SCHEMA = (
    "(Tensor counts, Tensor indices, Tensor? full_counts, Tensor? full_indices, Tensor key, SymInt block) -> Tensor"
)


def listed_blocks(
    counts: Tensor, indices: Tensor, full_counts: Tensor | None, full_indices: Tensor | None, key: Tensor, block: int
) -> Tensor:
    """Whether a key block is in one of the lists of a query block.

    Args:
        counts: [B, H, rows], the length of each list.
        indices: [B, H, rows, any], indices of key blocks.
        full_counts, full_indices: the same for full blocks; None if there are no such lists.
        key: [B, H, Nk, D]; only its length is used.
        block: keys per block.

    Returns:
        [B, H, rows, ceil(Nk / block)] bool.
    """
    columns = _columns(key, block)
    found = as_blocks(counts, indices, columns)
    if full_counts is not None and full_indices is not None:
        found |= as_blocks(full_counts, full_indices, columns)
    return found


def as_blocks(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """[B, H, rows, columns]: whether a block is listed. Entries past the count or out of range are ignored."""
    counted = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    inside = counted & (indices >= 0) & (indices < columns)
    dense = torch.zeros(*indices.shape[:-1], columns + 1, dtype=torch.bool, device=counts.device)
    return dense.scatter_(-1, indices.long().where(inside, columns), True)[..., :-1]


def listed_blocks_fake(counts, indices, full_counts, full_indices, key, block):
    shape = (*indices.shape[:-1], _columns(key, block) + 1)
    return counts.new_empty(shape, dtype=torch.bool)[..., :-1]


def _columns(key, block):
    return (key.shape[2] + block - 1) // block


def _no_gradient(ctx, *grads):
    raise NoGradient("effattn::listed_blocks has no gradient")


OPS = {"listed_blocks": Op(SCHEMA, listed_blocks, listed_blocks_fake, _no_gradient)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

"""The index that a selector yields: for every query block, the units of keys to visit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockList:
    """Units of ``unit`` consecutive keys, for rows in blocks of ``block``. The tensors are contiguous.

    Query head h reads list ``h // (Hq // L)`` and takes from it as many units as ``kv_num_blocks`` says of that head.
    Units that hold positions of the rows themselves come first, and only there causality has to be tested; then those
    that every head of the list visits, in any order, then what the next count adds, and so on. No unit comes twice.
    """

    kv_indices: Tensor  # int32 [B, L, M, K]: numbers of units; past ``kv_num_blocks`` anything
    kv_num_blocks: Tensor  # int32 [B, C, M], C a multiple of L and a divisor of Hq: how many of them are visited
    partial: Tensor  # int32 [M]: how many of the first ones hold positions of the rows
    block: int
    unit: int

    def rows(self, start: int, stop: int, heads: int, k_len: int) -> Tensor:
        """Which keys the query rows ``start <= q < stop`` may visit, causality aside: bool [B, Hq, rows, Nk].

        Makes masks of the blocks of these rows alone: ask for few at once.
        """
        blocks = slice(start // self.block, (stop - 1) // self.block + 1)
        indices, count = self.kv_indices[:, :, blocks], self.kv_num_blocks[:, :, blocks]
        indices = indices.repeat_interleave(count.shape[1] // indices.shape[1], dim=1).long()
        taken = torch.arange(indices.shape[3], device=indices.device) < count[..., None]
        units = -(-k_len // self.unit)
        kept = torch.zeros(*count.shape, units, dtype=torch.uint8, device=indices.device)
        # past the count stands any number: it must not undo what another place says
        kept.scatter_reduce_(3, indices.clamp(0, units - 1), taken.to(torch.uint8), "amax")
        kept = kept.bool().repeat_interleave(self.unit, dim=3)[..., :k_len]
        kept = kept.repeat_interleave(heads // count.shape[1], dim=1)
        return kept[:, :, torch.arange(start, stop, device=kept.device) // self.block - blocks.start]

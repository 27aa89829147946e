"""The index that a selector yields: for every query block, the units of keys to visit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockList:
    """Units of ``unit`` consecutive keys, for rows in blocks of ``block``. The tensors are contiguous.

    Query head h reads list ``h // (Hq // L)`` and takes from it as many units as ``count`` says of that head. The units
    that hold the positions of the rows themselves come first, and only there causality has to be tested; no unit
    comes twice.
    """

    order: Tensor  # int32 [B, L, M, K]: numbers of units, most important first; past ``count`` anything
    count: Tensor  # int32 [B, C, M], C a multiple of L and a divisor of Hq: how many of them are visited
    edges: Tensor  # int32 [M]: how many of the first ones hold positions of the rows
    block: int
    unit: int

    def keys(self, k_len: int) -> Tensor:
        """Which keys each row of blocks may visit, causality aside: bool [B, C, M, Nk]. For small inputs."""
        batch, lists, blocks, width = self.order.shape
        heads = self.count.shape[1]
        order = self.order.repeat_interleave(heads // lists, dim=1).long()
        taken = torch.arange(width, device=order.device) < self.count[..., None]
        units = -(-k_len // self.unit)
        kept = torch.zeros(batch, heads, blocks, units, dtype=torch.uint8, device=order.device)
        # past the count stands any number: it must not undo what another place says
        kept.scatter_reduce_(3, order.clamp(0, units - 1), taken.to(torch.uint8), "amax")
        return kept.bool().repeat_interleave(self.unit, dim=3)[..., :k_len]

    def rows(self, start: int, stop: int, heads: int, k_len: int) -> Tensor:
        """The same for query rows ``start <= q < stop`` of all heads: bool [B, Hq, rows, Nk]."""
        kept = self.keys(k_len).repeat_interleave(heads // self.count.shape[1], dim=1)
        return kept[:, :, torch.arange(start, stop, device=kept.device) // self.block]

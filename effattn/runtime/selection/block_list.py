"""For every query block, the units of keys to visit: the result of a selector, or of a block map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

ALIGNED = 16  # bytes; Triton specialises on it


@dataclass(frozen=True)
class BlockList:
    """Units of ``unit`` consecutive keys for blocks of ``block`` queries. The tensors are contiguous int32.

    Where all batches share a list, its first dimension is 1; ``partial`` may also be shared by all lists. Query head h
    reads list ``h // (Hq // L)`` and visits the first units of it, as many as its ``kv_num_blocks`` says. The first
    ``partial`` units are tested, the others less:

    * of a selector: the partial ones hold positions of the block's own queries, and only these need a causal mask.
      Conditions on data are tested everywhere. After them come the units that every head of the list visits, in any
      order, then those added by the next larger count, and so on.
    * of a block map: the whole rule is tested in partial units; in the others every query keeps every key.

    No unit is listed twice.
    """

    kv_indices: Tensor  # [B or 1, L, M, K]: indices of units; undefined past ``kv_num_blocks``
    kv_num_blocks: Tensor  # [B or 1, C, M], C a multiple of L and a divisor of Hq: how many of them are visited
    partial: Tensor  # [B or 1, L or 1, M]: how many of the first units are partial
    block: int
    unit: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.kv_indices, self.kv_num_blocks, self.partial

    @staticmethod
    def of_parts(parts: Tensor, shape: Sequence[int], block: int, unit: int) -> BlockList:
        """The block map whose tensors lie one behind another in ``parts``; ``shape``: of ``kv_indices``."""
        lists, rows, width = shape[1:]
        sizes = sizes_of_parts(shape)
        second = parts.storage_offset() + sizes[0]
        few, of_few = shape[:3], (lists * rows, rows, 1)
        return BlockList(
            parts.as_strided(shape, (lists * rows * width, rows * width, width, 1)),
            parts.as_strided(few, of_few, second),
            parts.as_strided(few, of_few, second + sizes[1]),
            block,
            unit,
        )

    def parts(self) -> Tensor:
        """The inverse of :meth:`of_parts`: int32, contiguous."""
        found = self.kv_indices.new_zeros(sum(sizes_of_parts(self.kv_indices.shape)))
        parts = BlockList.of_parts(found, self.kv_indices.shape, self.block, self.unit)
        for part, tensor in zip(parts.tensors(), self.tensors(), strict=True):
            part.copy_(tensor)
        return found

    def units(self, blocks: slice, number: int) -> Tensor:
        """Which of so many units some blocks of queries visit: bool [B or 1, C, blocks, number]."""
        indices, count = self.kv_indices[:, :, blocks], self.kv_num_blocks[:, :, blocks]
        indices = indices.repeat_interleave(count.shape[1] // indices.shape[1], dim=1).long()
        taken = torch.arange(indices.shape[3], device=indices.device) < count[..., None]
        found = torch.zeros(*count.shape, number, dtype=torch.uint8, device=indices.device)
        # entries past the count are undefined and must not overwrite others
        return found.scatter_reduce_(3, indices.clamp(0, number - 1), taken.to(torch.uint8), "amax").bool()

    def rows(self, start: int, stop: int, heads: int, k_len: int) -> Tensor:
        """Keys that queries ``start <= q < stop`` visit, without conditions: bool [B or 1, Hq, stop - start, Nk].

        The mask has Nk columns, so ask for few queries at a time.
        """
        blocks = slice(start // self.block, (stop - 1) // self.block + 1)
        kept = self.units(blocks, -(-k_len // self.unit)).repeat_interleave(self.unit, dim=3)[..., :k_len]
        kept = kept.repeat_interleave(heads // kept.shape[1], dim=1)
        return kept[:, :, torch.arange(start, stop, device=kept.device) // self.block - blocks.start]


def sizes_of_parts(shape: Sequence[int]) -> tuple[int, int, int]:
    """Elements of a block map's tensors where they lie one behind another; each begins at a multiple of 16 bytes."""
    few = _aligned(prod(shape[:3]))
    return _aligned(prod(shape)), few, few


def checked_parts(parts: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The parts of a block map that a caller passes, as kernels take for granted: no launch key holds what they are.

    Raises:
        ValueError: they are not those of a block map whose ``kv_indices`` have this shape.
    """
    needed = _all_parts(shape)
    if parts.dtype != torch.int32 or parts.shape != needed or not parts.is_contiguous():
        raise ValueError(f"a block map of {shape} is int32 {list(needed)}, not {parts.dtype} {list(parts.shape)}")
    return parts.clone() if parts.data_ptr() % ALIGNED else parts


@lru_cache(maxsize=1024)
def _all_parts(shape: tuple[int, ...]) -> tuple[int]:
    return (sum(sizes_of_parts(shape)),)


@lru_cache(maxsize=1024)
def places_of_parts(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Where these tensors begin, in bytes."""
    first, second, _ = sizes_of_parts(shape)
    return 0, 4 * first, 4 * (first + second)


def _aligned(elements: int) -> int:
    each = ALIGNED // 4
    return (elements + each - 1) // each * each

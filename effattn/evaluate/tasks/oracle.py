"""The oracle: as many key blocks as a form keeps, chosen by their true softmax mass. No selection can recover more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Tile = tuple[int, int]  # rows that share a choice, keys that are chosen together


@dataclass(frozen=True)
class Chosen:
    """What the oracle has in each block of rows: [..., row blocks], float32 (mass) and int64 (pairs)."""

    mass: Tensor  # sum over the rows of a block of the mass on the chosen keys
    pairs: Tensor  # allowed pairs in the chosen blocks


def by_tiles(values: Tensor, tile: Tile) -> Tensor:
    """Sums over tiles: [..., rows, keys] -> [..., ceil(rows / tile rows), ceil(keys / tile keys)]."""
    rows, keys = values.shape[-2:]
    high, wide = tile
    if keys % wide or rows % high:
        values = functional.pad(values, (0, -keys % wide, 0, -rows % high))
    return values.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).sum(dim=(-3, -1))


def oracle(mass: Tensor, kept: Tensor, allowed: Tensor) -> Chosen:
    """Choose, in every block of rows, as many blocks of keys by mass as the form touches.

    Args:
        mass: softmax mass of the tiles, float32 [..., row blocks, key blocks]; see :func:`by_tiles`.
        kept: pairs that the form keeps in each tile, broadcasts to ``mass``.
        allowed: pairs that the user's mask allows in each tile, broadcasts to ``mass``.
    """
    budget = (kept > 0).sum(dim=-1, keepdim=True).expand(*mass.shape[:-1], 1)
    ordered, order = mass.sort(dim=-1, descending=True)
    within = torch.arange(mass.shape[-1], device=mass.device) < budget
    pairs = allowed.expand(mass.shape).gather(-1, order)
    return Chosen((ordered * within).sum(dim=-1), (pairs * within).sum(dim=-1))

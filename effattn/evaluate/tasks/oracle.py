"""The oracle: as many key blocks as a form keeps, chosen by true softmax mass. No selector can recover more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Tile = tuple[int, int]  # queries that share a choice, keys that are chosen together


@dataclass(frozen=True)
class Chosen:
    """The oracle's choice per query block: [..., query blocks], float32 (mass) and int64 (pairs)."""

    mass: Tensor  # on the chosen keys, summed over the queries of a block
    pairs: Tensor  # allowed pairs in the chosen blocks


def by_tiles(values: Tensor, tile: Tile) -> Tensor:
    """Sums over tiles: [..., rows, keys] to [..., ceil(rows / tile rows), ceil(keys / tile keys)]."""
    rows, keys = values.shape[-2:]
    high, wide = tile
    if keys % wide or rows % high:
        values = functional.pad(values, (0, -keys % wide, 0, -rows % high))
    return values.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high)).sum(dim=(-3, -1))


def oracle(mass: Tensor, kept: Tensor, allowed: Tensor) -> Chosen:
    """Choose, in every query block, as many key blocks as the form touches, by mass.

    Args:
        mass: softmax mass of the tiles, float32 [..., query blocks, key blocks]; see :func:`by_tiles`.
        kept: pairs that the form keeps per tile, broadcasts to ``mass``.
        allowed: pairs that the mask allows per tile, broadcasts to ``mass``.
    """
    budget = (kept > 0).sum(dim=-1, keepdim=True).expand(*mass.shape[:-1], 1)
    ordered, order = mass.sort(dim=-1, descending=True)
    within = torch.arange(mass.shape[-1], device=mass.device) < budget
    pairs = allowed.expand(mass.shape).gather(-1, order)
    return Chosen((ordered * within).sum(dim=-1), (pairs * within).sum(dim=-1))

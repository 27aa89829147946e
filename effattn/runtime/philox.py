"""Which weights of attention dropout keeps: a function of the seed and of a weight's place, and of nothing else.

So every kernel of every target finds the same ones, forward and backward, whatever its tiles. It is Philox 4x32-7
(Salmon et al., Parallel random numbers: as easy as 1, 2, 3), with the seed as its key. A call gives eight numbers of 16
bits: for queries q and q + 8 and keys k, k + 8, k + 16 and k + 24, since these are places of a tile that one thread
holds. ``_kept_tile`` of ``effattn/lowering/dialects/triton/device_functions.py`` is the same in Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SEEDS = 2**63 - 1  # a seed is drawn from the numbers below
ROUNDS = 7
EIGHT = 8  # the distance of queries, and of keys, that share a call
_WORD, _HALF, _SIGN = 0xFFFFFFFF, 0xFFFF, 0x8000
_FACTORS, _STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, *counters: Any) -> tuple[Any, Any, Any, Any]:
    """Four random words of 32 bits as int64, for four counters below 2**32 that broadcast. ``seed``: int64 []."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        # products are those of unsigned numbers modulo 2**64
        low, high = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1, c2, c3 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD, ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _STEPS[0]) & _WORD, (k1 + _STEPS[1]) & _WORD
    return c0, c1, c2, c3


def kept(seed: Tensor, least: int, pairs: Tensor, rows: tuple[int, int], keys: Sequence[tuple[int, int]]) -> Tensor:
    """Which weights are kept.

    Args:
        seed: int64 [].
        least: :attr:`effattn.ir.attention.AttentionSpec.least_kept`.
        pairs: batch * heads + head, int64 [..., 1, 1].
        rows: queries ``start <= q < stop``.
        keys: the same for keys, one interval after another.

    Returns:
        bool [..., rows, keys].
    """
    # numbers are compared as signed ones
    parts = [(_numbers(seed, pairs, rows, part) ^ _SIGN) >= least + _SIGN for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _numbers(seed: Tensor, pairs: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """The random numbers of a tile, int64 [..., rows, keys], of 16 bits."""
    calls, inside = [], []
    for (start, stop), shared in ((rows, 2 * EIGHT), (keys, 4 * EIGHT)):
        first, last = start // shared, -(-stop // shared)
        calls.append(torch.arange(first * EIGHT, last * EIGHT, device=seed.device))
        inside.append(slice(start - first * shared, stop - first * shared))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, calls[0][:, None], calls[1], pairs, 0)), dim=-1)
    halves = torch.stack((words & _HALF, words >> 16), dim=-1)
    # queries: sixteen, place in eight; keys: thirty-two, place in eight; which eight of queries, of keys, pair of these
    halves = halves.unflatten(-2, (2, 2)).unflatten(-4, (-1, EIGHT)).unflatten(-6, (-1, EIGHT))
    order = (-7, -3, -6, -5, -1, -2, -4)
    halves = halves.permute(*range(halves.ndim - 7), *(halves.ndim + dim for dim in order))
    return halves.flatten(-4, -1).flatten(-4, -2)[..., inside[0], inside[1]]

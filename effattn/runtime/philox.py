"""Which weights of attention dropout keeps: a function of the seed and of a weight's place, and of nothing else.

So every kernel of every target finds the same ones, forward and backward, whatever its tiles. It is Philox 4x32-7
(Salmon et al., Parallel random numbers: as easy as 1, 2, 3), with the seed as its key. A call gives four words: for
queries q and q + 8 and keys k and k + 8, since these are the places of a tile that one thread holds, with queries as
rows or with keys. ``_kept_tile`` of ``effattn/lowering/dialects/triton/device_functions.py`` is the same in Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SEEDS = 2**63 - 1  # a seed is drawn from the numbers below
ROUNDS = 7
SHARED = 16  # queries, and keys, of which pairs at a distance of half of it share a call
_WORD, _SIGN = 0xFFFFFFFF, 0x80000000
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
    # words are compared as signed numbers
    parts = [(_words(seed, pairs, rows, part) ^ _SIGN) >= least + _SIGN for part in keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _words(seed: Tensor, pairs: Tensor, rows: tuple[int, int], keys: tuple[int, int]) -> Tensor:
    """The words of a tile, int64 [..., rows, keys]."""
    calls, inside = [], []
    for start, stop in (rows, keys):
        first, last = start // SHARED * SHARED, -(-stop // SHARED) * SHARED
        calls.append(torch.arange(first // 2, last // 2, device=seed.device))
        inside.append(slice(start - first, stop - first))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, calls[0][:, None], calls[1], pairs, 0)), dim=-1)
    half = SHARED // 2
    words = words.unflatten(-1, (2, 2)).unflatten(-3, (-1, half)).unflatten(-5, (-1, half))
    order = (-6, -2, -5, -4, -1, -3)  # of queries: sixteen, half, place in it; of keys the same
    words = words.permute(*range(words.ndim - 6), *(words.ndim + dim for dim in order))
    return words.flatten(-3, -1).flatten(-4, -2)[..., inside[0], inside[1]]

"""The softmax in the window and the products of features next to it: query blocks with key blocks, in ATen.

Queries are [B, Hk, blocks, G x window, D], keys [B, Hk, blocks, n, D]: the heads of a group share a key block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTS = 2**26  # most scores of one piece


def whole(tensor: Tensor, window: int) -> Tensor:
    """[B, H, N, D] in blocks, zero-padded: [B, H, blocks, window, D]."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[2] % window)).unflatten(2, (-1, window))


def rows_in_blocks(tensor: Tensor, kv_heads: int, window: int) -> Tensor:
    """[B, Hq, N, D] to [B, Hk, blocks, G x window, D]."""
    return whole(tensor, window).unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4)


def in_rows(blocks: Tensor, window: int, length: int) -> Tensor:
    """The inverse of :func:`rows_in_blocks`: [B, Hq, N, D]."""
    return blocks.unflatten(3, (-1, window)).transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :length]


def before(blocks: Tensor, many: int) -> Tensor:
    """[B, H, blocks, ...] with each block replaced by the one ``many`` before it, zeros first."""
    return torch.cat([torch.zeros_like(blocks[:, :, :many]), blocks], dim=2)[:, :, : blocks.shape[2]]


def after(blocks: Tensor, many: int) -> Tensor:
    """The transpose of :func:`before`."""
    return torch.cat([blocks[:, :, many:], torch.zeros_like(blocks[:, :, :many])], dim=2)


class Window:
    """Weights ``e^(q k - greatest)`` of the keys in the window."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, window: int, terraced: bool):
        """Arguments as in :func:`effattn.runtime.ops.window_hybrid.window_hybrid`, in the dtype of the computation.

        ``query`` is already scaled.
        """
        self.window, self.terraced, self.length = window, terraced, query.shape[2]
        self.rows = rows_in_blocks(query, key.shape[1], window)
        own, values = whole(key, window), whole(value, window)
        self.keys = torch.cat([before(own, 1), own], dim=3)
        self.values = torch.cat([before(values, 1), values], dim=3)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums of weights times value, and of weights: [B, Hq, N, Dv], [B, Hq, N, 1]."""
        both = [(weights @ values, weights.sum(dim=-1, keepdim=True)) for _, _, _, values, weights, _ in self._pieces()]
        with_value, alone = (torch.cat(parts, dim=2) for parts in zip(*both, strict=True))
        return in_rows(with_value, self.window, self.length), in_rows(alone, self.window, self.length)

    def gradients(self, of_values: Tensor, of_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key, value and of a factor per head [Hq] on both sums, from those of :meth:`sums`."""
        kv_heads = self.keys.shape[1]
        given, alone = (rows_in_blocks(tensor, kv_heads, self.window) for tensor in (of_values, of_weights))
        parts = []
        for piece, rows, keys, values, weights, greatest in self._pieces():
            of_scores = (given[:, :, piece] @ values.mT + alone[:, :, piece]) * weights
            of_factor = of_scores.sum(dim=-1, keepdim=True)
            # the greatest score is subtracted from all others, so its gradient loses the sum of theirs
            of_scores = of_scores - of_factor * greatest / greatest.sum(dim=-1, keepdim=True)
            parts.append((of_scores @ keys, of_scores.mT @ rows, weights.mT @ given[:, :, piece], of_factor))
        of_query, of_key, of_value, of_factor = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        factors = in_rows(of_factor, self.window, self.length).sum(dim=(0, 2, 3))
        return in_rows(of_query, self.window, self.length), self._folded(of_key), self._folded(of_value), factors

    def _folded(self, blocks: Tensor) -> Tensor:
        """The gradients of each block as own block and as the one before, added: [B, Hk, N, D]."""
        earlier, own = blocks.split(self.window, dim=3)
        return (own + after(earlier, 1)).flatten(2, 3)[:, :, : self.length]

    def _pieces(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """(blocks, their queries, keys, values, weights, positions of the greatest scores)."""
        batch, kv_heads, blocks, height, _ = self.rows.shape
        step = max(ELEMENTS // max(batch * kv_heads * height * 2 * self.window, 1), 1)
        for first in range(0, blocks, step):
            piece = slice(first, first + step)
            rows, keys, values = (tensor[:, :, piece] for tensor in (self.rows, self.keys, self.values))
            scores = (rows @ keys.mT).unflatten(3, (-1, self.window))
            scores = scores.masked_fill(~self._seen(piece)[:, None], -torch.inf).flatten(3, 4)
            top = scores.amax(dim=-1, keepdim=True)
            yield piece, rows, keys, values, (scores - top).exp(), scores == top

    def _seen(self, piece: slice) -> Tensor:
        """Which keys of a block and the one before are in the window of its queries: bool [blocks, window, 2
        window]."""
        device, window = self.rows.device, self.window
        row, column = torch.arange(window, device=device)[:, None], torch.arange(2 * window, device=device)
        seen = column <= row + window
        if not self.terraced:
            seen = seen & (column > row)
        block = torch.arange(self.rows.shape[2], device=device)[piece, None, None]
        return seen & ((block > 0) | (column >= window))  # the first block has no block before it


class Rest:
    """Products of features with the keys, two blocks before the query's, that come after the query's offset in a block.

    A terraced window begins at a block boundary. With keys shifted by two blocks, the linear op covers that block only
    up to the query's own offset; this adds the keys after it.
    """

    def __init__(self, of_query: Tensor, of_key: Tensor, value: Tensor, window: int):
        self.window, self.length = window, of_query.shape[2]
        self.rows = rows_in_blocks(of_query, of_key.shape[1], window)
        self.keys, self.values = (before(whole(tensor, window), 2) for tensor in (of_key, value))

    def sums(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Window.sums`."""
        weights = self._behind(self.rows @ self.keys.mT)
        with_value, alone = weights @ self.values, weights.sum(dim=-1, keepdim=True)
        return in_rows(with_value, self.window, self.length), in_rows(alone, self.window, self.length)

    def gradients(self, of_values: Tensor, of_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the features of query and key, and of value."""
        given, alone = (rows_in_blocks(tensor, self.keys.shape[1], self.window) for tensor in (of_values, of_weights))
        weights = self._behind(self.rows @ self.keys.mT)
        of_products = self._behind(given @ self.values.mT + alone)
        of_query = in_rows(of_products @ self.keys, self.window, self.length)
        of_key, of_value = (
            after(blocks, 2).flatten(2, 3)[:, :, : self.length]
            for blocks in (of_products.mT @ self.rows, weights.mT @ given)
        )
        return of_query, of_key, of_value

    def _behind(self, products: Tensor) -> Tensor:
        return products.unflatten(3, (-1, self.window)).triu(1).flatten(3, 4)

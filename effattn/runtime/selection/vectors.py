"""The vectors that are scored: tokens or means of tokens, per head or averaged over groups of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from effattn.ir.selector import Last, Mean, Piece, Strided


def pool_heads(tensor: Tensor, lists: int) -> Tensor:
    """[B, H, N, D] to [B, L, N, D]: the float32 mean of heads in ``lists`` groups; 0: every head by itself.

    Query heads of one key head are adjacent and equally many, so the mean over a group's key heads gives every query
    head the same weight.
    """
    if lists in (0, tensor.shape[1]):
        return tensor
    return tensor.unflatten(1, (lists, -1)).mean(dim=2, dtype=torch.float32).to(tensor.dtype)


def vectors(tensor: Tensor, piece: Piece, lists: int) -> Tensor:
    """[B, H, N, D] to [B, L, R, D]: :func:`take` on pooled heads. Only tokens that are scored are pooled."""
    if isinstance(piece, Strided | Last):
        return pool_heads(take(tensor, piece), lists)
    return take(pool_heads(tensor, lists), piece)


def take(tensor: Tensor, piece: Piece) -> Tensor:
    """[B, L, N, D] to [B, L, R, D]: the vectors of a piece."""
    if isinstance(piece, Strided):
        return tensor[:, :, :: piece.stride]
    if isinstance(piece, Last):
        return tensor[:, :, max(tensor.shape[2] - piece.size, 0) :]
    assert isinstance(piece, Mean)
    return block_means(tensor, piece)


def indices(length: int, piece: Piece, device: torch.device) -> Tensor:
    """Indices of the tokens in the result of :func:`take`: int64 [R]."""
    start = max(length - piece.size, 0) if isinstance(piece, Last) else 0
    return torch.arange(start, length, piece.stride if isinstance(piece, Strided) else 1, device=device)


def block_means(tensor: Tensor, piece: Mean) -> Tensor:
    """Means of ``piece.size`` tokens; the last may have fewer: [B, L, ceil(N / size), D] float32."""
    length = tensor.shape[2]
    whole = length // piece.size * piece.size
    means = tensor[:, :, :whole].unflatten(2, (-1, piece.size)).mean(dim=3, dtype=torch.float32)
    if piece.root_length:
        means = means * piece.size**0.5
    if whole < length:
        rest = tensor[:, :, whole:].mean(dim=2, keepdim=True, dtype=torch.float32)
        means = torch.cat([means, rest * (length - whole) ** 0.5 if piece.root_length else rest], dim=2)
    return means

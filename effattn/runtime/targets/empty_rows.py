"""Gradients of queries without keys, which no loop over keys visits, in closed form: O(N), for every target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effattn.ir.attention import AttentionSpec
from effattn.ir.derivative import affine_slope
from effattn.runtime.algebra import bindings, evaluate


def add_empty_rows(
    spec: AttentionSpec,
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    lse: Tensor,
    data: tuple[Sequence[Tensor], Sequence[int], Sequence[float]],
) -> None:
    """Add what queries without keys give to the gradients of query, key and value, in place.

    Args:
        grads: of query [B, Hq, Nq, D], where they are zero for such queries, key [B, Hkv, Nk, D] and value.
        grad_out: [B, Hq, Nq, Dv]; lse: [B, Hq, Nq].
        tensors: query, key and value.
        data: captured tensors, scalars and numbers, in the plan's order.
    """
    if spec.empty_rows != "nan" and spec.empty_output != "mean":
        return
    of_query, of_key, of_value = grads
    query, key, value = tensors
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    empty = lse == -torch.inf
    if spec.empty_rows == "nan":
        # weights of NaN reach every value; a mask that replaces scores keeps them from query and key
        of_value += torch.where(empty.unflatten(1, heads).any(dim=3).any(dim=2), torch.nan, 0.0)[..., None, None]
    if spec.empty_output != "mean":
        return
    lost = torch.where(empty[..., None], grad_out.to(torch.promote_types(grad_out.dtype, torch.float32)), 0.0)
    of_value += lost.unflatten(1, heads).sum(dim=(2, 3))[:, :, None] / key.shape[2]
    if spec.empty_rows != "uniform":
        return
    # d score[k] = grad_out . (value[k] - mean) / Nk: sums over keys and queries are matrices of Dv x D
    lost = (lost * _slope(spec, data, query, key)).unflatten(1, heads)
    apart = value.to(lost.dtype) - value.mean(dim=2, keepdim=True, dtype=lost.dtype)
    by_key = apart.transpose(-1, -2) @ key.to(lost.dtype) / key.shape[2]
    of_query += (lost @ by_key[:, :, None]).flatten(1, 2)
    by_query = lost.flatten(2, 3).transpose(-1, -2) @ query.unflatten(1, heads).flatten(2, 3).to(lost.dtype)
    of_key += apart @ by_query / key.shape[2]


def _slope(spec: AttentionSpec, data, query: Tensor, key: Tensor) -> Tensor | float:
    """The factor of the raw score, a number or [B or 1, Hq or 1, 1, 1]."""
    symbols, captures = bindings(spec, *data)
    for place, name in enumerate("bh"):
        size = [1, 1, 1, 1]
        size[place] = query.shape[place]
        symbols[name] = torch.arange(query.shape[place], device=query.device).view(size)
    symbols |= {"Nq": query.shape[2], "Nk": key.shape[2]}
    slope = affine_slope(spec.score)
    assert slope is not None
    return evaluate(slope, symbols, captures, torch.promote_types(query.dtype, torch.float32), query.device)

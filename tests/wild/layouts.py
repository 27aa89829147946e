"""Layouts: where batch, heads, rows and head_dim stand, and how wide they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from row import Row
from torch import nn


@dataclass
class Shape:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    queries: int = 9
    keys: int = 9
    width: int = 16
    value_width: int | None = None


class Layout(nn.Module):
    """Attention of tensors that come as [B, N, H, D]; ``attend`` brings them into its own order."""

    def __init__(self, attend: Callable, shape: Shape):
        super().__init__()
        self.attend, self.shape = attend, shape

    def forward(self, q, k, v):
        return self.attend(q, k, v)


def heads_first(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def heads_first_eager(q, k, v):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.2
    n, m = scores.shape[-2:]
    scores = scores.masked_fill(torch.ones(n, m).tril(m - n) == 0, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def rows_first(q, k, v):
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q * 0.2, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def groups_apart(q, k, v):
    q = q.unflatten(2, (k.shape[2], -1))
    weights = torch.einsum("bqhgd,bkhd->bhgqk", q * 0.2, k).softmax(-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v).flatten(2, 3)


def rows_before_heads(q, k, v):
    """One key head, and scores as [batch, rows, heads, keys]: only the mask, or the length, tells rows from heads."""
    weights = torch.einsum("bqhd,bkd->bqhk", q * 0.2, k[:, :, 0]).softmax(-1)
    return torch.einsum("bqhk,bkd->bqhd", weights, v[:, :, 0])


def rows_before_heads_causal(q, k, v):
    scores = torch.einsum("bqhd,bkd->bqhk", q * 0.2, k[:, :, 0])
    scores = scores + torch.full((q.shape[1], k.shape[1]), float("-inf")).triu(1)[:, None, :]
    return torch.einsum("bqhk,bkd->bqhd", scores.softmax(-1), v[:, :, 0])


def heads_in_batch(q, k, v):
    batch, rows, heads, _ = q.shape
    q, k, v = (t.transpose(1, 2).reshape(batch * heads, t.shape[1], -1) for t in (q, k, v))
    out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return out.view(batch, heads, rows, -1).transpose(1, 2)


def packed(q, k, v):
    qkv = torch.stack((q, k, v), dim=2)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def of(attend: Callable, shape: Shape, predicate: str = "true", name: str = "", **options) -> Row:
    def inputs():
        kv = (shape.batch, shape.keys, shape.kv_heads)
        q = torch.randn(shape.batch, shape.queries, shape.heads, shape.width)
        return q, torch.randn(*kv, shape.width), torch.randn(*kv, shape.value_width or shape.width)

    return Row(lambda: Layout(attend, shape), inputs, predicate, name=name or attend.__name__, **options)


CAUSAL, OFFSET = "k <= q", "k <= q + Nk - Nq"  # lengths of which nothing is known
ROWS = [
    of(heads_first, Shape(), CAUSAL),
    of(heads_first, Shape(kv_heads=2), CAUSAL, "grouped"),
    of(heads_first, Shape(kv_heads=1), CAUSAL, "one-key-head"),
    of(heads_first_eager, Shape(kv_heads=2), CAUSAL, "grouped-eager", while_symbolic=OFFSET),
    of(heads_first_eager, Shape(queries=4), "k <= 5 + q", "fewer-queries", while_symbolic=OFFSET),
    of(heads_first_eager, Shape(batch=1), CAUSAL, "batch-of-one", while_symbolic=OFFSET),
    of(rows_first, Shape(kv_heads=2), name="rows-first"),
    of(rows_first, Shape(queries=3, keys=12), name="cross"),
    of(groups_apart, Shape(kv_heads=2)),
    of(rows_before_heads, Shape(kv_heads=1)),
    of(rows_before_heads_causal, Shape(kv_heads=1), CAUSAL),
    of(heads_in_batch, Shape()),
    of(packed, Shape()),
    of(heads_first, Shape(width=192, value_width=128), CAUSAL, "192-and-128"),
    of(heads_first_eager, Shape(width=192, value_width=128), CAUSAL, "192-and-128-eager", while_symbolic=OFFSET),
    *(
        of(heads_first_eager, Shape(width=width), CAUSAL, f"head_dim-{width}", while_symbolic=OFFSET)
        for width in (80, 96, 256)
    ),
]

"""Masks as callers give them and models build them: what is read, and what stays a tensor."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from row import Row
from torch import nn

WIDTH, HEADS, N = 32, 4, 13
INF = float("inf")


class Masked(nn.Module):
    """One attention; ``mask(q, k, *more)`` gives what SDPA takes as attn_mask, or is added or filled in eager code."""

    def __init__(self, mask, eager: bool = False):
        super().__init__()
        self.mask, self.eager, self.qkv = mask, eager, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, *more):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = self.mask(x, *more)
        if not self.eager:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Cached(nn.Module):
    """A decode step into a cache of fixed length, whose position is a tensor or a number."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("k_cache", torch.zeros(2, HEADS, 24, 8))
        self.register_buffer("v_cache", torch.zeros(2, HEADS, 24, 8))
        self.register_buffer("causal_mask", torch.tril(torch.ones(24, 24, dtype=torch.bool)))

    def forward(self, x, input_pos):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        mask = self.causal_mask[None, None, input_pos]
        out = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, dropout_p=0.0)
        return out.transpose(1, 2).flatten(2)


class Cross(nn.Module):
    """A decoder over an encoder whose padding is an attention mask of ones and zeros."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x, memory, attention_mask):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.kv(memory).chunk(2, -1))
        extended = (1.0 - attention_mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
        scores = q @ k.transpose(-1, -2) / math.sqrt(8) + extended
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def pair(x):
    i = torch.arange(x.shape[1])
    return i[:, None], i[None, :]


def given(x, mask):
    return mask


def by_lengths(x, cu_seqlens):
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    document = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths, output_size=x.shape[1])
    i, j = pair(x)
    return (document[:, None] == document[None, :]) & (j <= i)


def by_comparing(x, cu_seqlens):
    i, j = pair(x)
    document = (torch.arange(x.shape[1])[:, None] >= cu_seqlens[None, 1:]).sum(-1)
    return (document[:, None] == document[None, :]) & (j <= i)


def by_marks(x, cu_seqlens):
    marks = torch.zeros(x.shape[1], dtype=torch.long).index_fill(0, cu_seqlens[1:-1], 1)
    document = marks.cumsum(0)
    return document[:, None] == document[None, :]


def by_bucketize(x, cu_seqlens):
    document = torch.bucketize(torch.arange(x.shape[1]), cu_seqlens, right=True)
    return document[:, None] == document[None, :]


def by_positions(x, position_ids):
    document = (position_ids == 0).cumsum(-1)
    i, j = pair(x)
    return ((document[:, :, None] == document[:, None, :]) & (j <= i))[:, None]


def by_ends_of_text(x, ids):
    """Documents end with token 0, as GPT-2's data does."""
    document = (ids == 0).cumsum(-1) - (ids == 0).long()
    i, j = pair(x)
    return ((document[:, :, None] == document[:, None, :]) & (j <= i))[:, None]


def padding_and_prefix(x, token_type_ids, attention_mask):
    """PaliGemma: an image sees all of itself, text is causal, padding is hidden."""
    i, j = pair(x)
    allowed = (j <= i) | (token_type_ids[:, None, :] == 0)
    return (allowed & (attention_mask[:, None, :] != 0))[:, None]


def blocks_by_loop(x):
    mask = torch.zeros(N, N, dtype=torch.bool)
    for start, end in ((0, 4), (4, 10), (10, 13)):
        mask[start:end, start:end] = True
    return mask


def blocks_by_block_diag(x):
    return torch.block_diag(*(torch.ones(n, n) for n in (4, 6, 3))).bool()


def window_by_band(x):
    n = x.shape[1]
    return torch.ones(n, n).tril(2).triu(-2).bool()


def random_and_global(x):
    """BigBird's global tokens, in both directions."""
    i, j = pair(x)
    return ((i - j).abs() <= 2) | (j < 2) | (i < 2)


def strided(x):
    """Sparse Transformer: the last few, and every fourth."""
    i, j = pair(x)
    return (j <= i) & ((i - j < 4) | (j % 4 == 3))


def filled_by_zeros(x):
    n = x.shape[1]
    return torch.zeros(n, n).fill_(-INF).triu(1)


def stacked(x):
    n = x.shape[1]
    return torch.hstack([torch.zeros(n, 0), torch.full((n, n), -INF).triu(1)])


def x_(*more):
    return lambda: (torch.randn(2, N, WIDTH), *more)


def bools() -> torch.Tensor:
    return torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(3)) > 0.3


IDS = torch.tensor([[5, 5, 0, 5, 5, 5, 0, 5, 5, 5, 5, 5, 0], [5] * 13])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4, 5], list(range(13))])
TYPES = (torch.arange(N) >= torch.tensor([[4], [6]])).long()
CU = torch.tensor([0, 4, 10, 13])
RIGHT = (torch.arange(N) < torch.tensor([[13], [9]])).long()
SAME, OF_BATCH = "document[q] == document[k]", "document[b, q] == document[b, k]"
BAND = "q - k < 3 & k <= 2 + q"


def row(mask, more=(), predicate: str = "true", **options) -> Row:
    eager = options.pop("eager", False)
    options.setdefault("name", f"{mask.__name__}{'-eager' if eager else ''}")
    return Row(lambda: Masked(mask, eager), x_(*more), predicate, **options)


ROWS = [
    row(given, (bools(),), "mask[b, 0, q, k]", name="bool-from-caller", symbolic=(0, 1)),
    row(given, (bools(),), "mask[b, 0, q, k]", name="bool-from-caller-eager", eager=True),
    row(given, (torch.where(bools(), 0.0, -INF),), "true", score="bias[b, 0, q, k]", name="float-from-caller"),
    row(
        given, (torch.where(bools(), 0.0, -INF),), score="bias[b, 0, q, k]", name="float-from-caller-eager", eager=True
    ),
    row(given, (bools()[:1, 0],), "mask[0, q, k]", name="bool-3d-from-caller"),
    row(by_lengths, (CU,), f"k <= q & {SAME}"),
    row(by_comparing, (CU,), f"k <= q & {SAME}"),
    row(by_marks, (CU,), SAME),
    row(by_bucketize, (CU,), SAME),
    row(by_positions, (POSITIONS,), f"k <= q & {OF_BATCH}"),
    row(
        by_ends_of_text,
        (IDS,),
        "k <= q & document[b, q] + Where(~document2[b, q], -1, 0) == document[b, k] + Where(~document2[b, k], -1, 0)",
    ),
    row(padding_and_prefix, (TYPES, RIGHT), "padding2[b, k] & (k <= q | ~padding[b, k])"),
    row(blocks_by_loop, (), "mask[q, k]", symbolic=(0,)),
    row(blocks_by_block_diag, (), "mask[q, k] != 0", symbolic=(0,)),
    row(window_by_band, (), BAND),
    row(window_by_band, (), BAND, eager=True),
    row(random_and_global, (), f"k < 2 | q < 2 | ({BAND})"),
    row(strided, (), "k <= q & (q - k < 4 | k%4 == 3)"),
    row(filled_by_zeros, (), "k <= q"),
    row(stacked, (), "k <= q"),
    Row(
        Cached,
        lambda: (torch.randn(2, 1, WIDTH), torch.tensor([5])),
        "k <= offset[0]",
        name="gpt-fast-step",
        train=False,
    ),
    Row(
        Cached,
        lambda: (torch.randn(2, 6, WIDTH), torch.arange(6)),
        "k <= rows[q]",
        name="gpt-fast-prefill",
        train=False,
    ),
    Row(Cross, lambda: (torch.randn(2, 5, WIDTH), torch.randn(2, N, WIDTH), RIGHT), score="bias[b, 0, 0, k]"),
]

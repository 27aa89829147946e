"""Scores and outputs that are more, or less, than one product."""

from __future__ import annotations

import torch

from tests.fuzz.tables.hostile.scores import INF, distance, mixed_heads, scores


def second_product(q, k, v, given):
    return (scores(q, k) + q.flip(-1) @ k.mT).softmax(-1) @ v


def shaw(q, k, v, given):
    """Relative positions that meet the query: a second product, of data."""
    place = distance(q, k).clamp(-7, 7) + 7
    table = given["relative"].repeat(1, q.shape[-1])[:, : q.shape[-1]]
    return (scores(q, k) + torch.einsum("bhid,ijd->bhij", q, table[place])).softmax(-1) @ v


def talking_heads(q, k, v, given):
    mixed = torch.einsum("bhij,hg->bgij", scores(q, k), mixed_heads(q))
    return mixed.softmax(-1) @ v


def talking_weights(q, k, v, given):
    w = scores(q, k).softmax(-1)
    return torch.einsum("bhij,hg->bgij", w, mixed_heads(q)) @ v


def best_scores(q, k, v, given):
    s = scores(q, k)
    least = s.topk(min(2, s.shape[-1]), dim=-1).values[..., -1:]
    return s.masked_fill(s < least, -INF).softmax(-1) @ v


def scores_above_zero(q, k, v, given):
    s = scores(q, k)
    return torch.where(s > 0, s, -1e9).softmax(-1) @ v


def triangle_of_scores(q, k, v, given):
    """Later keys keep a score of 0: they are not hidden."""
    return scores(q, k).tril().softmax(-1) @ v


def scores_set(q, k, v, given):
    s = scores(q, k)
    s[..., -1] = 0.5
    return s.softmax(-1) @ v


def scores_of_pieces(q, k, v, given):
    half = k.shape[2] // 2
    s = torch.cat([scores(q, k[:, :, :half]), scores(q, k[:, :, half:])], dim=-1)
    return s.softmax(-1) @ v


def values_of_pieces(q, k, v, given):
    w = scores(q, k).softmax(-1)
    half = k.shape[2] // 2
    return w[..., :half] @ v[:, :, :half] + w[..., half:] @ v[:, :, half:]


def products_by_hand(q, k, v, given):
    s = (q[:, :, :, None] * k[:, :, None]).sum(-1)
    return s.softmax(-1) @ v

"""Queries, keys and values that are one another, parts of something, or masks that are data."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.fuzz.tables.hostile.scores import INF, causal, distance, positions, scores


def two_layers(q, k, v, given):
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return (scores(x, k).masked_fill(~causal(q @ k.mT), -INF)).softmax(-1) @ v


def one_tensor(q, k, v, given):
    return (q @ q.mT).softmax(-1) @ q


def key_is_value(q, k, v, given):
    return scores(q, k).softmax(-1) @ k


def key_of_another_batch(q, k, v, given):
    return scores(q, k.flip(0)).softmax(-1) @ v.roll(1, 0)


def every_other_key(q, k, v, given):
    i, j = positions(q)[:, None], positions(k)
    seen = (j <= i)[:, ::2]
    return scores(q, k[:, :, ::2]).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v[:, :, ::2]


def appended_keys(q, k, v, given):
    k, v = torch.cat([k, k * 0.5], dim=2), torch.cat([v, v + 1], dim=2)
    i, j = positions(q)[:, None], positions(k)
    return scores(q, k).masked_fill(j > i + k.shape[2] // 2, -INF).softmax(-1) @ v


def cache_written(q, k, v, given):
    keys, values = torch.zeros_like(k).repeat(1, 1, 2, 1), torch.zeros_like(v).repeat(1, 1, 2, 1)
    keys[:, :, : k.shape[2]] = k
    values[:, :, : v.shape[2]] = v
    seen = positions(keys) < k.shape[2]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None].expand(q.shape[2], -1)), keys


def live_dropout(q, k, v, given):
    """All weights are dropped, so that a result can be compared."""
    return F.dropout(scores(q, k).softmax(-1), 1.0) @ v


def multiplied_mask(q, k, v, given):
    """Hidden keys have a score of 0, which is a weight like others."""
    return (scores(q, k) * causal(q @ k.mT)).softmax(-1) @ v


def infinite_bias(q, k, v, given):
    """A key that all rows hide, in some sequences all of them, by data that is added."""
    return (scores(q, k) + given["infinite bias"]).softmax(-1) @ v


def negative_index(q, k, v, given):
    """An index below zero counts from the end."""
    place = distance(q, k).clamp(-7, 7)
    return (scores(q, k) + given["relative"][place].permute(2, 0, 1)).softmax(-1) @ v


def detached(q, k, v, given):
    return scores(q, k).detach().softmax(-1) @ v


def result_changed(q, k, v, given):
    out = scores(q, k).softmax(-1) @ v
    out += 1
    out[..., 0] = 0
    return out


def expanded_query(q, k, v, given):
    """One query of all sequences, as in a Perceiver."""
    latent = given["latent"][None].expand(q.shape[0], -1, -1, -1)
    return scores(latent, k).softmax(-1) @ v


def one_key_of_all(q, k, v, given):
    return scores(q, k[:1]).softmax(-1) @ v[:1]


def keys_in_rows(q, k, v, given):
    """Scores [keys, queries] from beginning to end."""
    s = k @ q.mT * 0.3
    return (v.mT @ s.masked_fill(~causal(s.mT).mT, -INF).softmax(-2)).mT


def value_scaled(q, k, v, given):
    return scores(q, k).softmax(-1) @ (v * 2.0 / 3)


def value_of_one_row(q, k, v, given):
    return scores(q, k).softmax(-1) @ v[:, :, :1].expand(-1, -1, k.shape[2], -1)


def under_autocast(q, k, v, given):
    with torch.autocast(q.device.type, torch.bfloat16):
        return scores(q, k).masked_fill(~causal(q @ k.mT), -INF).softmax(-1) @ v


def query_raised_by_the_result(q, k, v, given):
    q = q.clone()
    out = scores(q, k).softmax(-1) @ v
    q += out
    return q

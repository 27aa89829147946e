"""Causal masks: one predicate in many spellings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from mask_cases import INF, MIN, D, qkv, scores, sdpa


def tril(q, k, v):
    n = q.shape[2]
    return scores(q, k).masked_fill(torch.tril(torch.ones(n, n)) == 0, -INF).softmax(-1) @ v


def tril_bool(q, k, v):
    n = q.shape[2]
    return torch.where(torch.ones(n, n, dtype=torch.bool).tril(), scores(q, k), MIN).softmax(-1) @ v


def triu_added(q, k, v):
    n = q.shape[2]
    return (scores(q, k) + torch.triu(torch.full((n, n), -INF), diagonal=1)).softmax(-1) @ v


def triu_times_billion(q, k, v):
    n = q.shape[2]
    return (scores(q, k) - torch.triu(torch.ones(n, n), 1) * 1e9).softmax(-1) @ v


def one_minus_mask(q, k, v):
    n = q.shape[2]
    mask = torch.ones(1, 1, n, n).tril()
    return (scores(q, k) + (1.0 - mask) * MIN).softmax(-1) @ v


def keys_at_most_queries(q, k, v):
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, i[None, :] <= i[:, None])


def queries_at_least_keys(q, k, v):
    i = torch.arange(q.shape[2])
    return sdpa(q, k, v, (i[:, None] >= i[None, :]).expand(1, 1, -1, -1))


def not_future(q, k, v):
    i = torch.arange(q.shape[2])
    return scores(q, k).masked_fill(~(i < i.view(-1, 1) + 1), MIN).softmax(-1) @ v


def distance(q, k, v):
    i = torch.arange(q.shape[2])
    return torch.where(i[:, None] - i[None, :] < 0, -INF, scores(q, k)).softmax(-1) @ v


def float_positions(q, k, v):
    i = torch.arange(q.shape[2], dtype=torch.float32)
    return scores(q, k).masked_fill(i[None] > i[:, None], -1e9).softmax(-1) @ v


def cumulative(q, k, v):
    i = torch.ones(q.shape[2], dtype=torch.long).cumsum(0) - 1
    return sdpa(q, k, v, i[None, :] <= i[:, None])


def scaled_after_the_mask(q, k, v):
    n = q.shape[2]
    return ((q @ k.mT + torch.full((n, n), MIN).triu(1)) / math.sqrt(D)).softmax(-1) @ v


def multiplied_and_shifted(q, k, v):
    n = q.shape[2]
    mask = torch.ones(n, n).tril()
    return (scores(q, k) * mask - 1e9 * (1 - mask)).softmax(-1) @ v


def limited_from_below(q, k, v):
    n = q.shape[2]
    added = scores(q, k) + torch.full((n, n), MIN).triu(1)
    return torch.max(added, torch.tensor(MIN)).softmax(-1) @ v


def mask_of_a_longer_buffer(q, k, v):
    buffer = torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64)
    n = q.shape[2]
    return torch.where(buffer[:, :, n - n : n, :n], scores(q, k), MIN).softmax(-1) @ v


def is_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def twice(q, k, v):
    n = q.shape[2]
    i = torch.arange(n)
    seen = scores(q, k).masked_fill(i[None] > i[:, None], -INF)
    return (seen + torch.full((n, n), -INF).triu(1)).softmax(-1) @ v


def filled_in_place(q, k, v):
    n = q.shape[2]
    mask = torch.zeros(n, n)
    mask.masked_fill_(torch.arange(n)[None, :] > torch.arange(n)[:, None], -INF)
    return (scores(q, k) + mask).softmax(-1) @ v


def long_names(q, k, v):
    queries = torch.arange(q.shape[2])[:, None]
    keys = queries.T
    seen = torch.less_equal(keys, queries) & queries.greater_equal(keys) & torch.less(keys, queries + 1)
    hidden = torch.greater(keys, queries) | torch.not_equal(seen, True)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v


CAUSAL = [
    tril, tril_bool, triu_added, triu_times_billion, one_minus_mask, keys_at_most_queries, queries_at_least_keys,
    not_future, distance, float_positions, cumulative, scaled_after_the_mask, multiplied_and_shifted,
    limited_from_below, mask_of_a_longer_buffer, is_causal, twice, filled_in_place,
    long_names,
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda function: function.__name__)
def test_causal(spelling, dynamic):
    report, _ = compiled(spelling, *qkv(), lengths=(0, 2) if dynamic else ())
    assert [site.predicate for site in report.sites] == ["k <= q"], report
    assert report.sites[0].empty_rows == "never"
    assert "effattn.attend" not in report.graph(), "SDPA's own causal kernel computes it"

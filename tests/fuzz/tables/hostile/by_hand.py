"""Fills that callers give, and softmaxes that are written out, with something amiss."""

from __future__ import annotations

import torch.nn.functional as F

from tests.fuzz.tables.hostile.scores import causal, scores


def given_lowest(q, k, v, given):
    return (scores(q, k) + given["low pairs"]).softmax(-1) @ v


def given_lowest_in_sdpa(q, k, v, given):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=given["low pairs"])


def standardised(q, k, v, given):
    s = scores(q, k)
    return ((s - s.mean(-1, keepdim=True)) / (s.std() + 1)).softmax(-1) @ v


def weights_doubled(q, k, v, given):
    return (scores(q, k).softmax(-1) * 2.0) @ v


def divided_at_the_end(q, k, v, given):
    """The sum divides the result: no softmax stands there."""
    e = scores(q, k).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def other_sum(q, k, v, given):
    e = scores(q, k).exp()
    return e / e.sum(-2, keepdim=True) @ v


def sum_and_more(q, k, v, given):
    e = scores(q, k).exp()
    return e / (e.sum(-1, keepdim=True) + 1.0) @ v


def sum_of_others(q, k, v, given):
    """Divided by the sum over keys that the query may see, and not only those are weighed."""
    e = scores(q, k).exp()
    return e / (e * causal(q @ k.mT)).sum(-1, keepdim=True) @ v


def shifted_by_another(q, k, v, given):
    s = scores(q, k)
    e = (s - s.amax(-2, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def exponential_used_elsewhere(q, k, v, given):
    e = scores(q, k).exp()
    return e / e.sum(-1, keepdim=True) @ v, e


def exponential_written(q, k, v, given):
    e = scores(q, k).exp()
    total = e.sum(-1, keepdim=True)
    e.tril_()
    return e / total @ v

"""Tensors that are written between, before or after what attention reads of them."""

from __future__ import annotations

import torch

from tests.fuzz.tables.hostile.scores import INF, positions, scores


def value_written_between(q, k, v, given):
    v = v.clone()
    w = scores(q, k).softmax(-1)
    v.mul_(2)
    return w @ v


def key_written_between(q, k, v, given):
    k = k.clone()
    w = scores(q, k).softmax(-1)
    k.zero_()
    return w @ v, k


def query_written_after(q, k, v, given):
    q = q.clone()
    out = scores(q, k).softmax(-1) @ v
    q.add_(1)
    return out, q


def scores_written_after(q, k, v, given):
    s = scores(q, k)
    out = s.softmax(-1) @ v
    s.zero_()
    return out, s


def mask_written_between(q, k, v, given):
    seen = given["pairs"].clone()
    first = scores(q, k).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v
    seen[..., 0] = False
    seen[..., -1] = True
    return first, scores(q, k).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v


def padding_written_between(q, k, v, given):
    seen = given["padding"].clone()
    first = scores(q, k).masked_fill(~seen[:, None, None], -INF).softmax(-1) @ v
    seen.logical_not_()
    seen[:, 0] = True
    return first, scores(q, k).masked_fill(~seen[:, None, None], -INF).softmax(-1) @ v


def counter_raised_between(q, k, v, given):
    past, j = given["past"].clone(), positions(k)
    i = positions(q)[:, None]
    first = scores(q, k).masked_fill(j > i + past, -INF).softmax(-1) @ v
    past += 2
    return first, scores(q, k).masked_fill(j > i + past, -INF).softmax(-1) @ v, past

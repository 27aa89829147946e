"""Weights that something else reads or changes, and what is not quite a softmax of scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.fuzz.tables.hostile.scores import INF, causal, scores


def weights_returned(q, k, v, given):
    w = scores(q, k).softmax(-1)
    return w @ v, w


def weights_averaged(q, k, v, given):
    w = F.softmax(scores(q, k), -1)
    return w @ v, w.mean(1)


def scores_returned(q, k, v, given):
    s = scores(q, k)
    return s.softmax(-1) @ v, s


def logarithm_returned(q, k, v, given):
    s = scores(q, k).masked_fill(~causal(q @ k.mT), -INF)
    return s.softmax(-1) @ v, torch.logsumexp(s, dim=-1)


def weights_multiplied(q, k, v, given):
    return (scores(q, k).softmax(-1) * given["pair bias"]) @ v


def weights_divided(q, k, v, given):
    return (scores(q, k).softmax(-1) / (1 + given["pair bias"].abs())) @ v


def weights_added(q, k, v, given):
    return (scores(q, k).softmax(-1) + causal(q @ k.mT)) @ v


def weights_subtracted(q, k, v, given):
    return (scores(q, k).softmax(-1) - 0.4 * scores(q, k.flip(2)).softmax(-1)) @ v


def weights_subtracted_twice(q, k, v, given):
    first = scores(q, k).softmax(-1)
    return (first - 0.4 * scores(q, k.flip(2)).softmax(-1)) @ v + first @ v


def padded_by_one(q, k, v, given):
    return F.pad(scores(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


def checkpointed(q, k, v, given):
    def attention(q, k, v, hidden):
        return scores(q, k).masked_fill(hidden, -INF).softmax(-1) @ v

    return checkpoint(attention, q, k, v, ~causal(q @ k.mT), use_reentrant=False)


def weights_renormalised(q, k, v, given):
    w = scores(q, k).softmax(-1) * causal(q @ k.mT)
    return w / (w.sum(-1, keepdim=True) + 1e-6) @ v


def weights_masked(q, k, v, given):
    return torch.where(causal(q @ k.mT), scores(q, k).softmax(-1), 0.0) @ v


def weights_masked_as_scores(q, k, v, given):
    hidden = ~causal(q @ k.mT)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden, 0.0) @ v


def weights_masked_otherwise(q, k, v, given):
    hidden = ~causal(q @ k.mT)
    return scores(q, k).masked_fill(hidden, -INF).softmax(-1).masked_fill(hidden | hidden.flip(-1), 0.0) @ v


def weights_without_nan(q, k, v, given):
    s = scores(q, k).masked_fill(~given["pairs"], -INF)
    return torch.nan_to_num(s.softmax(-1)) @ v


def softmax_over_queries(q, k, v, given):
    return scores(q, k).softmax(-2) @ v


def softmax_over_heads(q, k, v, given):
    return scores(q, k).softmax(1) @ v


def softmax_twice(q, k, v, given):
    return scores(q, k).softmax(-1).softmax(-1) @ v


def log_softmax(q, k, v, given):
    return F.log_softmax(scores(q, k), -1).exp() @ v


def sigmoid(q, k, v, given):
    return torch.sigmoid(scores(q, k)) @ v


def rectified(q, k, v, given):
    return F.relu(scores(q, k)) @ v

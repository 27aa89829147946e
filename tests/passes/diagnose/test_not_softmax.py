"""What stands where attention has a softmax, and what a softmax of something else is: each with its true reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from small import INF, B, D, H, N, qkv

from effattn.ir.refusal import Why

EXPERTS = torch.nn.Parameter(torch.randn(5, D, generator=torch.Generator().manual_seed(1)))
MIXING = torch.randn(H, H, generator=torch.Generator().manual_seed(2))


def sigmoid(q, k, v):
    return torch.sigmoid(q @ k.mT - 2.0) @ v


def sigmoid_with_a_triangle(q, k, v):
    return ((q @ k.mT).sigmoid() * torch.ones(N, N).tril()) @ v


def squared_relu(q, k, v):
    return (F.relu(q @ k.mT) ** 2 / N) @ v


def gated_by_itself(q, k, v):
    return ((q @ k.mT) * torch.sigmoid(q @ k.mT)) @ v


def normalised_softplus(q, k, v):
    weights = F.softplus(q @ k.mT)
    return weights / weights.sum(-1, keepdim=True) @ v


def normalize(q, k, v):
    return F.normalize((q @ k.mT).relu(), p=1, dim=-1) @ v


def gumbel(q, k, v):
    torch.manual_seed(0)
    return F.gumbel_softmax(q @ k.mT, dim=-1) @ v


def sparsemax(q, k, v):
    z = q @ k.mT
    cumulated = (s := z.sort(-1, descending=True).values).cumsum(-1)
    ranks = torch.arange(1, N + 1)
    count = (1 + ranks * s > cumulated).sum(-1, keepdim=True)
    return (z - (cumulated.gather(-1, count - 1) - 1) / count).clamp(min=0) @ v


def hard(q, k, v):
    return F.one_hot((q @ k.mT).argmax(-1), N).float() @ v


def chunks_of_keys(q, k, v):
    largest = torch.full((B, H, N, 1), -1e30)
    total, out = torch.zeros(B, H, N, 1), torch.zeros(B, H, N, D)
    for start in range(0, N, 4):
        scores = q @ k[:, :, start : start + 4].mT
        new = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, kept = (scores - new).exp(), (largest - new).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        out = out * kept + weights @ v[:, :, start : start + 4]
        largest = new
    return out / total


def powers_of_two(q, k, v):
    """Divided by a sum of other powers."""
    weights = torch.exp2(q @ k.mT)
    return weights / torch.exp(q @ k.mT).sum(-1, keepdim=True) @ v


def divided_by_another_sum(q, k, v):
    weights = torch.exp(q @ k.mT)
    return weights / weights.sum(-2, keepdim=True).clamp(min=1) @ v


def heads_mixed_before(q, k, v):
    return torch.einsum("bhqk,hg->bgqk", q @ k.mT, MIXING).softmax(-1) @ v


def heads_mixed_after(q, k, v):
    return torch.einsum("bhqk,hg->bgqk", (q @ k.mT).softmax(-1), MIXING) @ v


def heads_mixed_by_a_layer(q, k, v):
    return F.linear((q @ k.mT).permute(0, 2, 3, 1), MIXING).permute(0, 3, 1, 2).softmax(-1) @ v


def heads_mixed_by_a_convolution(q, k, v):
    return F.conv2d((q @ k.mT).softmax(-1), MIXING[:, :, None, None]) @ v


def best_scores(q, k, v):
    scores = q @ k.mT
    return scores.masked_fill(scores < scores.topk(3).values[..., -1:], -INF).softmax(-1) @ v


def best_scores_scattered(q, k, v):
    scores = q @ k.mT
    hidden = torch.full_like(scores, -INF).scatter(-1, scores.topk(3).indices, 0.0)
    return (scores + hidden).softmax(-1) @ v


def best_weights(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights.masked_fill(weights < weights.topk(3).values[..., -1:], 0) @ v


def straight_through(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (F.one_hot(weights.argmax(-1), N) + weights - weights.detach()) @ v


def distances(q, k, v):
    return (-torch.cdist(q, k)).softmax(-1) @ v


def distances_by_hand(q, k, v):
    return (-(q[:, :, :, None] - k[:, :, None]).square().sum(-1)).softmax(-1) @ v


def additive(q, k, v):
    return (q[:, :, :, None] + k[:, :, None]).tanh().sum(-1).softmax(-1) @ v


MISSED = {
    sigmoid: Why.NO_SOFTMAX,
    sigmoid_with_a_triangle: Why.NO_SOFTMAX,
    squared_relu: Why.NO_SOFTMAX,
    gated_by_itself: Why.NO_SOFTMAX,
    normalised_softplus: Why.NO_SOFTMAX,
    normalize: Why.NO_SOFTMAX,
    gumbel: Why.RANDOM,
    sparsemax: Why.NO_SOFTMAX,
    hard: Why.CHOSEN_KEYS,
    chunks_of_keys: Why.NO_SOFTMAX,
    powers_of_two: Why.NO_SOFTMAX,
    divided_by_another_sum: Why.NORMALISER,
    heads_mixed_before: Why.TALKING_HEADS,
    heads_mixed_after: Why.TALKING_HEADS,
    heads_mixed_by_a_layer: Why.TALKING_HEADS,
    heads_mixed_by_a_convolution: Why.TALKING_HEADS,
    best_scores: Why.CHOSEN_KEYS,
    best_scores_scattered: Why.CHOSEN_KEYS,
    best_weights: Why.CHOSEN_KEYS,
    straight_through: Why.CHOSEN_KEYS,
    distances: Why.PAIRWISE,
    distances_by_hand: Why.PAIRWISE,
    additive: Why.PAIRWISE,
}


@pytest.mark.parametrize("function", MISSED, ids=lambda function: function.__name__)
def test_missed_once_and_with_its_reason(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == []
    (missed,) = report.missed
    assert (missed.rule, missed.attention) == (MISSED[function], True)
    assert missed.cause.startswith(f"{__file__}:")


def router(q, k, v):
    weights, chosen = (q @ EXPERTS.T).softmax(-1).topk(2, -1)
    return weights, chosen


def mixture_of_experts(q, k, v):
    gates = torch.einsum("bhnd,ed->bhne", q, EXPERTS).softmax(-1)
    return torch.einsum("bhne,bhned->bhnd", gates, torch.stack([v * n for n in range(5)], -2))


def mixture_by_a_sum(q, k, v):
    gates = (q @ EXPERTS.T).softmax(-1)
    return (torch.stack([v * n for n in range(5)], -1) * gates[..., None, :]).sum(-1)


def clusters(q, k, v):
    return (q @ EXPERTS.T).softmax(-1).mT @ v


def classes(q, k, v):
    return (q @ EXPERTS.T).softmax(-1)


def layers(q, k, v):
    outputs = torch.stack([k, v, q + 1])
    weights = torch.einsum("bhnd,lbhnd->bhnl", q, outputs).softmax(-1)
    return torch.einsum("bhnl,lbhnd->bhnd", weights, outputs)


def pointers(q, k, v):
    return (q @ k.mT).softmax(-1)


def gate_after_a_product(q, k, v):
    x = q @ k.mT @ v
    return x * torch.softmax(torch.erf(x), -1)


@pytest.mark.parametrize(
    "function",
    [router, mixture_of_experts, mixture_by_a_sum, clusters, classes, layers, pointers, gate_after_a_product],
    ids=lambda function: function.__name__,
)
def test_a_softmax_of_something_else_is_no_attention(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == []
    (missed,) = report.missed
    assert (missed.rule, missed.attention) == (Why.NOT_ATTENTION, False), missed


def perceptron(q, k, v):
    return F.relu(q @ EXPERTS.T) @ EXPERTS


def experts(q, k, v):
    return torch.einsum("bhne,ed->bhnd", torch.einsum("bhnd,ed->bhne", q, EXPERTS).sigmoid(), EXPERTS)


def similarities(q, k, v):
    return F.cross_entropy((q @ k.mT).flatten(0, 2), torch.arange(B * H * N) % N) + (q @ k.mT).relu().sum()


def indexer(q, k, v):
    """Scores of keys for a later choice: those of all heads, added with one weight for each head and query."""
    scores = F.relu(q.transpose(1, 2) @ k[:, :1].mT)
    return q.mean(-1).transpose(1, 2).unsqueeze(-2) @ scores


@pytest.mark.parametrize(
    "function", [perceptron, experts, similarities, indexer], ids=lambda function: function.__name__
)
def test_what_only_looks_alike_is_not_told(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == report.missed == []


def learned_queries(q, k, v):
    return F.dropout((EXPERTS @ k.mT).softmax(-1), 1.0, training=True) @ v


def test_learned_queries_are_attention():
    torch._dynamo.reset()
    report, _ = compiled(learned_queries, *qkv(), policy="exact", verify=False)
    assert [(missed.rule, missed.attention) for missed in report.missed] == [(Why.DROPOUT, True)]

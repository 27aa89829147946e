"""A softmax that is written out is found where it surely is one, and stays as it is written everywhere else."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

B, H, N, D = 2, 3, 9, 8


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def amax(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def greatest(q, k, v):
    scores = q @ k.mT
    weights = (scores - torch.max(scores, dim=-1, keepdim=True)[0]).exp()
    return (weights / torch.sum(weights, dim=-1, keepdim=True)) @ v


def detached(q, k, v):
    scores = q @ k.mT
    weights = (scores - scores.max(-1, True).values.detach()).exp()
    return weights.div(weights.sum(dim=[-1], keepdim=True)) @ v


def logsumexp(q, k, v):
    scores = q @ k.mT
    return torch.exp(scores - scores.logsumexp(-1, True)) @ v


def divided_after_the_product(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def divided_after_a_cast(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf).float()
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhqk,bhkd->bhqd", weights.to(v.dtype), v).div(weights.sum(-1)[..., None])


def sum_without_gradient(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    with torch.no_grad():
        total = weights.sum(-1, keepdim=True)
    return (weights / total) @ v


def logsumexp_without_gradient(q, k, v):
    scores = q @ k.mT
    with torch.no_grad():
        total = scores.logsumexp(-1, True)
    return torch.exp(scores - total) @ v


def sum_detached_after_the_product(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True).detach()


def weights_without_gradient_after_the_product(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def without_gradient(q, k, v):
    with torch.no_grad():
        scores = q @ k.mT
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def another_maximum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-2, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def another_sum(q, k, v):
    weights = torch.exp(q @ k.mT - (q @ k.mT).amax(-1, keepdim=True))
    return (weights / weights.sum(-2, keepdim=True)) @ v


def no_maximum(q, k, v):
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def written_between(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    weights[..., 0] = 0
    return (weights / total) @ v


def weights_returned(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v, weights


def sum_returned(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total, total


def divided_by_the_sum_of_another_row(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1)[:, :, None, :D]


def value_added_to_the_product(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.baddbmm(v, weights, v) / weights.sum(-1, keepdim=True)


def product_written_before_the_division(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out, total = weights @ v, weights.sum(-1, keepdim=True)
    out[..., 0] = 1.0
    return out / total


def features_that_are_exponentials(q, k, v):
    weights = q.exp()
    return (weights @ v[:, :, :D]) / weights.sum(-1, keepdim=True)


def more_than_the_sum(q, k, v):
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


@pytest.mark.parametrize(
    "function",
    [amax, greatest, detached, logsumexp, no_maximum, divided_after_the_product, divided_after_a_cast],
    ids=lambda function: function.__name__,
)
def test_found(function):
    report, _ = compiled(function, *qkv(), lengths=(0, 2))
    assert [site.found_as for site in report.sites] == ["softmax"]
    for name in ("exp", "sum", "amax", "logsumexp"):
        assert f".{name}(" not in report.graph()


def test_another_number_is_data_of_the_score():
    report, _ = compiled(another_maximum, *qkv())
    assert [site.found_as for site in report.sites] == ["softmax"]
    assert ".amax(" in report.graph()


LEFT = [
    another_sum, written_between, weights_returned, more_than_the_sum, sum_returned, divided_by_the_sum_of_another_row,
    features_that_are_exponentials, value_added_to_the_product, product_written_before_the_division,
]  # fmt: skip
GRADIENTS = [
    amax, detached, logsumexp, without_gradient, divided_after_the_product, divided_after_a_cast, sum_without_gradient,
    logsumexp_without_gradient, sum_detached_after_the_product, weights_without_gradient_after_the_product,
]  # fmt: skip


@pytest.mark.parametrize("function", LEFT, ids=lambda function: function.__name__)
def test_the_author_code_stays(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == []
    assert "exp(" in report.graph()
    assert "softmax" not in report.graph()


@pytest.mark.parametrize("function", GRADIENTS, ids=lambda f: f.__name__)
def test_gradients(function):
    torch._dynamo.reset()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
    results = []
    for run in (function, fast):
        given = [x.requires_grad_() for x in qkv()]
        out = run(*given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([x.grad for x in given])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

"""Weights that are multiplied with values element by element, and added up over the keys."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

from effattn.ir.refusal import Why

B, H, N, D = 2, 3, 7, 8


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def causal(q, k):
    return (q @ k.mT * 0.3).masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def by_new_dimensions(q, k, v):
    return (causal(q, k)[..., None] * v[:, :, None]).sum(-2)


def by_unsqueeze(q, k, v):
    return torch.sum(v.unsqueeze(2) * causal(q, k).unsqueeze(-1), dim=3)


def by_view(q, k, v):
    return (causal(q, k).view(B, H, N, N, 1) * v.view(B, H, 1, N, D)).sum(dim=3).transpose(1, 2)


def width_in_front(q, k, v):
    """[B, H, D, Nq, Nk]: summed over the last dimension."""
    return (causal(q, k)[:, :, None] * v.mT[:, :, :, None]).sum(-1)


def one_value_for_all_heads(q, k, v):
    return (causal(q, k)[..., None] * v[:, :1, None]).sum(-2)


def rows_summed(q, k, v):
    """Over queries, not over keys."""
    return (causal(q, k)[..., None] * v[:, :, :, None]).sum(-3)


def weights_returned(q, k, v):
    weights = causal(q, k)
    return (weights[..., None] * v[:, :, None]).sum(-2), weights


def products_returned(q, k, v):
    products = causal(q, k)[..., None] * v[:, :, None]
    return products.sum(-2), products.mean()


FOUND = [by_new_dimensions, by_unsqueeze, by_view, width_in_front]
LEFT_ALONE = [rows_summed, weights_returned, products_returned, one_value_for_all_heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
def test_found_and_right(function, dtype):
    given = [x.to(dtype) for x in qkv()]
    report, _ = compiled(function, *given, tolerance=None if dtype == torch.float32 else 3e-2)
    (site,) = report.sites
    assert site.predicate == "k <= q"
    assert not any(word in report.graph() for word in ("softmax", "einsum", "sum("))


def test_gradients():
    outs = []
    torch._dynamo.reset()
    fast = torch.compile(by_new_dimensions, backend="effattn", options={"rest": "eager", "strict": True})
    for run in (by_new_dimensions, fast):
        given = [x.requires_grad_() for x in qkv()]
        run(*given).square().sum().backward()
        outs.append([x.grad for x in given])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_what_is_no_attention_stays_as_it_was(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == []
    assert report.missed[0].rule in (Why.WEIGHTS, Why.VALUE, Why.HEADS)
    assert "einsum" not in report.graph()


def test_experts_are_weighed_as_they_were():
    def mixture(x, gate, experts):
        weights = (x @ gate).softmax(-1)
        return (weights[..., None] * torch.einsum("bnd,edf->bnef", x, experts)).sum(-2)

    report, _ = compiled(mixture, torch.randn(B, N, D), torch.randn(D, 4), torch.randn(4, D, D))
    assert report.sites == []

"""Batch and heads, or heads and head_dim, in one dimension of query, key and value, as in fairseq: [N, B * H, D]."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled

B, H, N, D = 2, 3, 7, 8
INF = float("inf")
_random = torch.Generator().manual_seed(0)
SEEN = torch.rand(B, N, generator=_random) > 0.4
SEEN[:, 0] = True


def randn(*shape):
    return torch.randn(*shape, generator=_random)


def attend(q, k, v, seen, batch, heads=H):
    """[B * H, N, D] each; a mask for each batch row is put in between."""
    rows, keys = q.shape[1], k.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, rows, keys)
    scores = scores.masked_fill(~seen[:, None, None], -INF)
    return torch.bmm(scores.softmax(-1).view(batch * heads, rows, keys), v)


def sequence_first(q, k, v, seen):
    out = attend(*(x.transpose(0, 1) for x in (q, k, v)), seen, B)
    return out.transpose(0, 1).contiguous().view(N, B, H * D)


def heads_first(q, k, v, seen):
    return attend(q, k, v, seen, B)


def projected(x, wq, wk, wv, seen):
    """fairseq: [N, B, H * D] viewed as [N, B * H, D]."""
    q, k, v = ((x @ w).view(x.shape[0], x.shape[1] * H, D).transpose(0, 1) for w in (wq, wk, wv))
    out = attend(q * D**-0.5, k, v, seen, x.shape[1])
    return out.transpose(0, 1).contiguous().view(*x.shape[:2], H * D)


def of_one_tensor(x, seen):
    """[N, B, H * 3 * D]: each head has its query, key and value side by side."""
    parts = x.view(x.shape[0], x.shape[1] * H, 3 * D).split(D, dim=-1)
    return attend(*(part.transpose(0, 1) for part in parts), seen, x.shape[1])


def grouped(q, k, v, seen):
    """Key and value have one head for all three of the query."""
    k, v = (x.transpose(0, 1)[:, None].expand(B, H, N, D).reshape(B * H, N, D) for x in (k, v))
    return attend(q.transpose(0, 1), k, v, seen, B)


def without_a_mask(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).view(B, H, N, N).softmax(-1).view(B * H, N, N), v)


def flat():
    return [randn(N, B * H, D) for _ in range(3)]


def weights():
    return [randn(H * D, H * D) * 0.2 for _ in range(3)]


FOUND = {
    sequence_first: lambda: [*flat(), SEEN],
    heads_first: lambda: [*(x.transpose(0, 1).contiguous() for x in flat()), SEEN],
    projected: lambda: [randn(N, B, H * D), *weights(), SEEN],
    of_one_tensor: lambda: [randn(N, B, 3 * H * D), SEEN],
    grouped: lambda: [flat()[0], randn(N, B, D), randn(N, B, D), SEEN],
    without_a_mask: flat,
}


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
def test_found_and_right(function, target):
    report, _ = compiled(function, *FOUND[function](), target=target)
    (site,) = report.sites
    assert site.predicate == ("true" if function is without_a_mask else "padding[b, k]")
    assert "bmm" not in report.graph()


@pytest.mark.parametrize("function", [projected, of_one_tensor], ids=lambda function: function.__name__)
def test_lengths_and_batch_may_be_dynamic(function):
    report, _ = compiled(function, *FOUND[function](), dynamic=True)
    assert len(report.sites) == 1, report.missed


@pytest.mark.parametrize("function", [sequence_first, projected], ids=lambda function: function.__name__)
def test_gradients(function):
    given, outs = [x.requires_grad_() if x.is_floating_point() else x for x in FOUND[function]()], []
    torch._dynamo.reset()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
    for run in (function, fast):
        run(*given).square().sum().backward()
        outs.append([x.grad.clone() for x in given if x.grad is not None])
        for x in given:
            x.grad = None
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)


def test_a_query_that_the_batch_shares():
    """Its batch is that of the key, which has no dimension of its own."""

    def function(latent, k, v, seen):
        q = latent[None].expand(k.shape[1] // H, -1, -1, -1).reshape(-1, *latent.shape[1:])
        return attend(q, k.transpose(0, 1), v.transpose(0, 1), seen, k.shape[1] // H)

    compiled(function, randn(H, 5, D), *flat()[1:], SEEN)

"""Uses of the weights that read their shape, dtype or device alone do not keep them alive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from small import B, D, H, N, qkv


def weights(q, k):
    return (q @ k.mT * 0.3).softmax(-1)


def cast_to_their_type(q, k, v):
    w = weights(q, k)
    return w @ v.double().type_as(w)


def zeros_of_their_type(q, k, v):
    w = weights(q, k)
    return torch.cat([w @ v, w.new_zeros(B, H, 1, D)], 2)


def zeros_of_their_shape(q, k, v):
    w = weights(q, k)
    return w @ v, torch.zeros_like(w, dtype=torch.bool).any(1)


def expanded_as_they_are(q, k, v):
    w = weights(q, k)
    return w @ v, torch.ones(1).expand_as(w.view(B, H * N, -1)).sum()


def moved_to_where_they_are(q, k, v):
    w = weights(q, k)
    return w @ v.to(w), w.size(2), w.dim()


def a_number_beside_them(q, k, v):
    w = weights(q, k)
    return w @ v, v.new_ones(()).view_as(w.new_zeros(()))


def chained(q, k, v):
    """fairseq: cast twice, once to be dropped out and once for those who ask for the weights."""
    w = F.softmax(q @ k.mT * 0.3, dim=-1, dtype=torch.float32)
    cast = w.type_as(w)
    probabilities = F.dropout(w.type_as(cast), 0.1, training=False)
    w.view(B, H, N, -1).type_as(cast).transpose(1, 0).mean(0)
    return probabilities @ v


def of_their_views(q, k, v):
    w = weights(q, k)
    return w @ v.type_as(w.double().mT).float()


def a_mask_like_the_scores(q, k, v):
    scores = q @ k.mT * 0.3
    seen = torch.ones_like(scores).tril().bool()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v, scores.new_tensor([1.0])


CASES = [value for value in list(globals().values()) if getattr(value, "__module__", "") == __name__]
CASES.remove(weights)


@pytest.mark.parametrize("lengths", [(), (0, 2)], ids=["static", "symbolic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_found_and_the_scores_are_gone(case, lengths):
    report, _ = compiled(case, *qkv(), lengths=lengths)
    assert len(report.sites) == 1, report.missed
    assert report.missed == []
    assert not any(word in report.graph() for word in ("softmax", "matmul"))


def test_gradients_are_those_of_the_untouched_code():
    given = [tensor.requires_grad_() for tensor in qkv()]
    torch._dynamo.reset()
    fast = torch.compile(cast_to_their_type, backend="effattn", options={"rest": "eager", "strict": True})
    weight = torch.linspace(-1, 1, given[0].numel()).view_as(given[0])
    for got, want in zip(
        torch.autograd.grad(fast(*given), given, weight),
        torch.autograd.grad(cast_to_their_type(*given), given, weight),
        strict=True,
    ):
        assert_close(got, want, 1e-4)


def test_random_numbers_of_their_shape_are_the_same():
    def call(q, k, v):
        torch.manual_seed(3)
        w = weights(q, k)
        return w @ v, torch.rand_like(w).sum(-1)

    report, _ = compiled(call, *qkv())
    assert len(report.sites) == 1
    assert "softmax" not in report.graph()


def of_their_values(q, k, v):
    w = weights(q, k)
    return w @ v, torch.ones_like(w) * w.amax(-1, keepdim=True)


def of_their_memory_order(q, k, v):
    w = (k @ q.mT * 0.3).softmax(-2).mT
    return w @ v, torch.zeros_like(w).mT.view(-1)


def written_to(q, k, v):
    w = weights(q, k)
    out = w @ v
    return out, torch.zeros_like(w.mul_(2.0)).sum(), w.sum()


@pytest.mark.parametrize("case", [of_their_values, of_their_memory_order, written_to], ids=lambda case: case.__name__)
def test_other_uses_keep_them(case):
    report, _ = compiled(case, *qkv())
    assert report.sites == []
    assert len(report.missed) == 1


def test_what_nobody_reads_is_no_use():
    """ESM-2: a mean over heads, which the caller does not take."""

    def call(q, k, v):
        w = weights(q, k)
        w.view(B, H, N, -1).transpose(1, 0).mean(0)
        w.std(-1).topk(2)
        torch.isnan(w).any()
        return w @ v

    report, _ = compiled(call, *qkv())
    assert len(report.sites) == 1, report.missed
    assert not any(word in report.graph() for word in ("softmax", "mean", "topk", "isnan"))


def test_statistics_that_nobody_reads_are_still_kept():
    mean, var = torch.zeros(H), torch.ones(H)

    def call(q, k, v, mean, var):
        w = weights(q, k)
        F.batch_norm(w, mean, var, training=True)
        return w @ v, mean * 1

    compiled(call, *qkv(), mean, var, verify=False)

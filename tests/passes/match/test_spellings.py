"""Every way to write softmax attention is found, read and replaced, and gives the same result."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

from effattn.compiler.backend import effattn

B, H, N, D = 2, 3, 17, 16


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def plain(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D), dim=-1) @ v


def softmax_in_float32(q, k, v):
    weights = F.softmax(torch.matmul(q, k.mT) * D**-0.5, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def scaled_query(q, k, v):
    return ((q * D**-0.5) @ k.transpose(2, 3)).softmax(-1) @ v


def scaled_on_both_sides(q, k, v):
    root = D**-0.25
    return ((q * root) @ (k * root).transpose(2, 3)).softmax(-1).matmul(v)


def soft_cap(q, k, v):
    scores = 5.0 * torch.tanh(q @ k.transpose(-1, -2) / math.sqrt(D) / 5.0)
    return scores.softmax(-1) @ v


def boolean_causal(q, k, v):
    mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    return (q @ k.transpose(-1, -2) * 0.25).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def triu_of_inf(q, k, v):
    mask = torch.full((q.shape[-2], q.shape[-2]), float("-inf")).triu(1)
    return torch.softmax(q @ k.transpose(-1, -2) * 0.25 + mask, -1) @ v


def in_place(q, k, v):
    scores = q @ k.transpose(-1, -2)
    scores *= 0.25
    scores += torch.full((q.shape[-2], q.shape[-2]), torch.finfo(torch.float32).min).triu(1)
    return scores.softmax(-1) @ v


def masked_in_place(q, k, v):
    scores = q @ k.transpose(-1, -2) * 0.25
    scores.masked_fill_(torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def einsum(q, k, v):
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(0.25).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def einsum_rows_first(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = (torch.einsum("b q h d, b k h d -> b h q k", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def einsum_with_dots(q, k, v):
    weights = (torch.einsum("...qd,...kd->...qk", q, k) * 0.25).softmax(dim=-1)
    return torch.einsum("...qk,...kd->...qd", weights, v)


def transposed_scores(q, k, v):
    scores = (k @ q.transpose(-1, -2) * 0.25).transpose(-1, -2)
    return scores.softmax(-1) @ v


def keys_first(q, k, v):
    weights = (k @ q.transpose(-1, -2) * 0.25).softmax(-2)  # [b, h, k, q], softmax over the keys
    return weights.transpose(-1, -2) @ v


def batched_3d(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul_(0.25).softmax(-1), v).unflatten(0, (-1, H))


def baddbmm_alibi(q, k, v):
    slopes = 2.0 ** -torch.arange(1, H + 1)
    alibi = (slopes[:, None, None] * torch.arange(q.shape[-2])[None, None, :]).repeat(q.shape[0], 1, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=0.25).unflatten(0, (-1, H))
    causal = torch.arange(q.shape[-2])[None, :] > torch.arange(q.shape[-2])[:, None]
    weights = scores.masked_fill(causal, torch.finfo(torch.float32).min).softmax(-1)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, (-1, H))


def dropout_that_does_nothing(q, k, v):
    weights = F.dropout(torch.softmax(q @ k.mT * 0.25, -1), p=0.1, training=False)
    return F.dropout(weights, p=0.0, training=True) @ v


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(), scale=0.3
    )


def sdpa_3d(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = torch.arange(q.shape[-2]) <= torch.arange(q.shape[-2])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def transposed_by_operators(q, k, v):
    """As Dynamo writes ``k.mT`` from torch 2.14 on."""
    return torch.softmax(q @ torch.ops.aten.mT(k) * 0.25, -1) @ torch.ops.aten.mH(torch.ops.aten.mH(v))


def special_softmax(q, k, v):
    return torch.special.softmax(q @ k.mT * 0.25, -1) @ v


def softmax_by_hand(q, k, v):
    e = torch.exp(q @ k.mT * 0.25)
    return e / e.sum(dim=-1, keepdim=True) @ v


def softmax_by_hand_shifted(q, k, v):
    scores = q @ k.mT * 0.25
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhij,bhjd->bhid", e / e.sum(-1, keepdim=True), v)


def softmax_by_hand_over_rows(q, k, v):
    """The scores lie the other way, and the largest is detached."""
    scores = k @ q.mT * 0.25
    e = torch.exp(scores - torch.max(scores, dim=2, keepdim=True)[0].detach())
    return (e / e.sum(2, keepdim=True)).mT @ v


def flattened_for_the_softmax(q, k, v):
    """Batch and heads are one dimension of the scores alone."""
    scores = (q @ k.mT * 0.25).flatten(0, 1)
    return scores.softmax(-1).unflatten(0, (-1, H)) @ v


def heads_as_rows(q, k, v):
    """Multi-query attention as one product: all heads are rows of the one key head."""
    q, k, v = q.flatten(1, 2), k[:, 0], v[:, 0]
    weights = (q @ k.mT * 0.25).view(-1, H, k.shape[1], k.shape[1]).softmax(-1)
    return (weights.flatten(1, 2) @ v).view(-1, H, k.shape[1], D)


def heads_as_rows_beside_a_head(q, k, v):
    q, k, v = q.flatten(1, 2)[:, None], k[:, :1], v[:, :1]
    weights = (q @ k.mT * 0.25).view(-1, H, k.shape[2], k.shape[2]).softmax(-1)
    return (weights.flatten(1, 2)[:, None] @ v).view(-1, H, k.shape[2], D)


def one_head(q, k, v):
    q, k, v = (x[0, 0] for x in (q, k, v))
    return (q @ k.T * 0.25).softmax(-1) @ v


SPELLINGS = [
    value
    for value in list(globals().values())
    if getattr(value, "__module__", "") == __name__ and hasattr(value, "__code__") and value.__code__.co_argcount == 3
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda function: function.__name__)
def test_found_read_and_equal(spelling, dynamic, qkv):
    report, _ = compiled(spelling, *qkv, lengths=(0, 2) if dynamic else ())
    assert [site.form for site in report.sites] == ["exact"], report
    assert report.missed == []
    assert "softmax(" not in report.graph()


@pytest.mark.parametrize(("batch", "predicate"), [(1, "padding[0, k]"), (B, "padding[b, k]")])
def test_batch_and_heads_are_told_apart_in_one_dimension(qkv, batch, predicate):
    """Key and value are not expanded, and padding is that of the sequence."""

    def call(q, k, v, padding):
        k, v = (x[:, :1].repeat_interleave(H, 1) for x in (k, v))
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (batch, H))
        scores = scores.masked_fill(~padding[:, None, None], float("-inf")).flatten(0, 1)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (batch, H))

    padding = torch.arange(N) < torch.tensor([[N], [5]])
    report, _ = compiled(call, *[x[:batch] for x in qkv], padding[:batch])
    (site,) = report.sites
    assert site.predicate == predicate
    assert f"B {batch}, heads {H}/1" in site.layout


class Scaled(torch.nn.Module):
    """Its scale is a number that Dynamo keeps as a constant, or as a symbol once it has changed."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, q, k, v):
        mask = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
        return (q @ k.mT * self.scale + mask).softmax(-1) @ v


@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_kernels_that_mask_before_they_scale_get_a_positive_scale(scale, qkv):
    report, _ = compiled(Scaled(scale), *qkv)
    assert report.sites[0].predicate == "k <= q"
    assert f"scale = {scale if scale > 0 else 1.0}" in report.graph()


def test_a_scale_that_changes_is_no_constant(qkv):
    torch._dynamo.reset()
    graphs = []

    def backend(gm, inputs):
        graphs.append(effattn(gm, inputs, options={"rest": "eager", "strict": True}))
        return graphs[-1]

    model = Scaled(0.3)
    fast = torch.compile(model, backend=backend)
    for scale, compilations in ((0.3, 1), (0.7, 2), (0.9, 2), (-0.2, 2), (0.0, 2)):
        model.scale = scale
        assert_close(fast(*qkv), model(*qkv))
        assert len(graphs) == compilations


CAUSAL = [boolean_causal, triu_of_inf, in_place, masked_in_place, baddbmm_alibi, sdpa, sdpa_3d]


@pytest.mark.parametrize("spelling", CAUSAL, ids=lambda function: function.__name__)
def test_causal_is_read_and_its_code_disappears(spelling, qkv):
    report, _ = compiled(spelling, *qkv, lengths=(0, 2))
    assert report.sites[0].predicate == "k <= q"
    for name in ("triu", "tril", "arange", "torch.ones", "torch.full"):
        assert name not in report.graph() or (name == "arange" and spelling is baddbmm_alibi)

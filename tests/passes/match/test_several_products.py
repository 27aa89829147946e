"""Scores that add several products: relative positions of every kind. One is the attention's, the others are data."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

from effattn.ir.refusal import Why

B, H, N, D, WIDE = 2, 3, 12, 8, 3  # N = 4 * WIDE


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D)] * 3 + [(2 * N, D)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def added(q, k, v, table):
    """Two products of the same kind."""
    return ((q @ k.mT + q @ v.mT) * 0.25).softmax(-1) @ v


def added_in_place(q, k, v, table):
    scores = q @ k.mT
    scores += q @ v.mT
    scores *= 0.25
    return scores.softmax(-1) @ v


def added_to_the_narrower_in_place(q, k, v, table):
    """What is written to is computed in the kernel: as data it would be copied."""
    scores = q[..., :2] @ k[..., :2].mT
    scores += q @ k.mT
    return scores.softmax(-1) @ v


def changed_in_between(q, k, v, table):
    """The second product is read as it was when it was added."""
    other = q @ v.mT
    scores = q @ k.mT + other
    other.zero_()
    return scores.softmax(-1) @ v + other.sum()


def wider_one_second(q, k, v, table):
    """What is computed in the kernel is the product over more numbers."""
    return (q[..., :2] @ k[..., :2].mT + q @ k.mT).softmax(-1) @ v


def gathered_distances(q, k, v, table):
    places = torch.arange(N)[:, None] - torch.arange(N)[None] + N
    return (q @ k.mT * 0.3 + torch.gather(q @ table.mT, -1, places.expand(B, H, N, N))).softmax(-1) @ v


def gathered_and_clamped(q, k, v, table):
    """As Inkling: distances beyond the table count as its last, those of later keys are hidden."""
    distance = torch.arange(N)[:, None] - torch.arange(N)[None]
    place = distance.clamp(0, 5).expand(B, H, -1, -1)
    bias = (q @ table[:6].mT).gather(-1, place).masked_fill((distance < 0) | (distance >= 6), 0.0)
    scores = q @ k.mT * 0.3 + bias
    return scores.masked_fill(distance < 0, torch.finfo(q.dtype).min).softmax(-1) @ v


def gathered_at_data(q, k, v, table):
    """As DeBERTa: places that are computed from data stay a tensor with a value per pair."""
    places = (table[:N, :1] + table[:N, 0]).abs().long().clamp(max=5).expand(B, H, N, N)
    return (q @ k.mT * 0.3 + (q @ table.mT).gather(-1, places)).softmax(-1) @ v


def shifted(q, k, v, table):
    """Transformer-XL's shift: padded by a column and seen with rows that are one longer."""
    scores = F.pad(q @ table[: 2 * N - 1].mT, (1, 0)).view(B, H, 2 * N, N)[:, :, 1:].reshape(B, H, N, 2 * N - 1)
    return ((q @ k.mT + scores[..., :N]) * 0.3).softmax(-1) @ v


def decomposed(q, k, v, table):
    """As in SAM: one product over the rows of a picture and one over its columns."""
    picture = q.view(B * H, 4, WIDE, D)
    rows = torch.einsum("bhwc,hkc->bhwk", picture, table[:16].view(4, 4, D))
    columns = torch.einsum("bhwc,wkc->bhwk", picture, table[:9].view(3, 3, D))
    bias = (rows[..., :, None] + columns[..., None, :]).reshape(B, H, N, N)
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def a_vector_for_each_pair(q, k, v, table):
    """wav2vec2-bert: the first product has a row of its own for each query, which is no head of the attention."""
    pairs = table[(torch.arange(N)[None] - torch.arange(N)[:, None]).clamp(-4, 4) + 4]
    bias = torch.einsum("bhld,lrd->bhlr", q, pairs) * 0.3
    return (q @ k.mT * 0.3 + bias).softmax(-1) @ v


def a_vector_for_each_pair_and_few_keys(q, k, v, table):
    pairs = table[(torch.arange(N)[None] - torch.arange(N)[:, None]).clamp(-4, 4) + 4]
    bias = torch.einsum("bhld,lrd->bhlr", q, pairs)
    return ((q @ k[:, :1].mT + bias) * 0.3).softmax(-1) @ v[:, :1]


def biased_query_and_position(q, k, v, table):
    """(q + u) k + (q + w) r, as Conformer has it."""
    return (((q + table[0]) @ k.mT + (q + table[1]) @ table[:N].mT) * 0.3).softmax(-1) @ v


FOUND = {
    added: "0.25*s + 0.25*bias[b, h, q, k]",
    added_in_place: "0.25*s + 0.25*bias[b, h, q, k]",
    added_to_the_narrower_in_place: "s + bias[b, h, q, k]",
    changed_in_between: "s + bias[b, h, q, k]",
    wider_one_second: "s + bias[b, h, q, k]",
    gathered_distances: "0.3*s + bias[b, h, q, 12 + q - k]",
    gathered_and_clamped: "bias[b, h, q, Min(5, Max(0, q - k))]",
    gathered_at_data: "0.3*s + bias[b, h, q, k]",
    shifted: "bias",
    decomposed: "[h + 3*b, q//3, q%3, k//3]",
    biased_query_and_position: "bias[b, h, q, k]",
    a_vector_for_each_pair: "0.3*s + 0.3*bias[b, h, q, k]",
    a_vector_for_each_pair_and_few_keys: "0.3*s + 0.3*bias[b, h, q, k]",
}


@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
def test_found_and_right(function):
    report, _ = compiled(function, *tensors())
    (site,) = report.sites
    assert report.missed == []
    assert FOUND[function] in site.score
    assert "softmax" not in report.graph()


def test_gathered_pairs_are_not_made():
    report, _ = compiled(gathered_distances, *tensors())
    assert "gather" not in report.graph()
    assert "gather" in report.graph(before=True)


def test_a_limit_of_the_query_is_no_mask():
    """Rows that see nothing would depend on data that is added, if that could hide keys as well."""

    class Limited(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(tensors()[3])
            self.project = torch.nn.Linear(D, D)
            self.register_buffer("limit", torch.tensor(2.0))

        def forward(self, x, k, v, seen):
            q = torch.clamp(self.project(x), max=self.limit)
            scores = q @ k.mT + q @ self.table[:N].mT
            return scores.masked_fill(~seen, -1e9).softmax(-1) @ v

    module = Limited()
    seen = torch.ones(B, 1, N, N, dtype=torch.bool).tril()
    seen[0, :, :4] = False
    with torch.no_grad():
        report, _ = compiled(module, *tensors()[:3], seen)
    assert [site.empty_rows for site in report.sites] == ["mean"], report.missed


def test_no_copy_of_what_is_added_in_place():
    report, _ = compiled(added_to_the_narrower_in_place, *tensors())
    assert "clone" not in report.graph()
    assert "+=" not in report.graph()


def test_half_precision():
    given = [x.bfloat16() for x in tensors()]
    for function in (added, gathered_and_clamped, decomposed):
        report, out = compiled(function, *given, tolerance=4e-2)
        assert len(report.sites) == 1
        assert_close(out.float(), function(*[x.float() for x in given]), 4e-2)


@pytest.mark.parametrize("function", [added, gathered_distances, decomposed], ids=lambda function: function.__name__)
def test_gradients_through_what_is_added(function):
    """It depends on the query, whose gradient has two parts."""
    given = [x.requires_grad_() for x in tensors()]
    weight = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(function(*given), given, weight, allow_unused=True)
    report, _ = compiled(function, *given, verify=False)
    assert len(report.sites) == 1
    assert "softmax" not in report.graph()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
    torch._dynamo.reset()
    found = torch.autograd.grad(fast(*given), given, weight, allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert_close(got, want, 1e-4)


def second_by_baddbmm(q, k, v, table):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (torch.bmm(q, k.mT) + torch.baddbmm(torch.ones(1), q, v.mT, beta=0.5)).softmax(-1) @ v


def multiplied(q, k, v, table):
    return ((q @ k.mT) * (q @ v.mT)).softmax(-1) @ v


def joined(q, k, v, table):
    """Keys in two parts, each with a value of its own."""
    weights = torch.cat([q @ k.mT, q @ table.mT], -1).softmax(-1)
    return weights[..., :N] @ v + weights[..., N:] @ table


def same_product_twice(q, k, v, table):
    scores = q @ k.mT
    return (scores + scores.mT).softmax(-1) @ v


LEFT_ALONE = {
    second_by_baddbmm: Why.SEVERAL_PRODUCTS,
    joined: Why.WEIGHTS,
    same_product_twice: Why.PRODUCT,
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_left_alone(function):
    report, _ = compiled(function, *tensors())
    assert report.sites == []
    (missed,) = report.missed
    assert missed.rule == LEFT_ALONE[function]


def test_a_product_as_factor_is_right():
    report, _ = compiled(multiplied, *tensors())
    assert len(report.sites) == 1

"""Products over several dimensions, and values with several dimensions of their own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from compiled import compiled
from small import tensors
from torch import einsum

B, R, H, N, D = 2, 3, 4, 9, 8


@dataclass(frozen=True)
class Case:
    scores: str
    result: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    head_dim: int = D

    def __call__(self, q, k, v):
        return einsum(self.result, (einsum(self.scores, q, k) * 0.3).softmax(-1), v)


def same(shape: tuple[int, ...]) -> tuple:
    return shape, shape, shape


CASES = {
    # MSA Transformer: all rows share the weights
    "tied-rows": Case("rinhd,rjnhd->hnij", "hnij,rjnhd->rinhd", *same((R, N, B, H, D)), (1, 2), R * D),
    "tied-rows-with-batch": Case("brihd,brjhd->bhij", "bhij,brjhd->brihd", *same((B, R, N, H, D)), (0, 2), R * D),
    "both-in-two": Case("bhqxd,bhkxd->bhqk", "bhqk,bhkxd->bhqxd", *same((B, H, N, 4, 2)), (0, 2)),
    "query-and-key-in-two": Case("bhqxd,bhkxd->bhqk", "bhqk,bhkd->bhqd", *same((B, H, N, 4, 2))[:2], (B, H, N, D)),
    "value-in-two": Case("bhqd,bhkd->bhqk", "bhqk,bhkxd->bqhxd", *same((B, H, N, D))[:2], (B, H, N, 2, 4), (0, 2)),
    "apart": Case("bxhqd,bxhkd->bhqk", "bhqk,bxhkd->bqxhd", *same((B, 2, H, N, 4)), (0, 3)),
    "a-part-of-one": Case("bhqxd,bhkxd->bhqk", "bhqk,bhkxd->bhqxd", *same((B, H, N, D, 1)), (0, 2)),
    "shared-key": Case("bhqxd,bkxd->bhqk", "bhqk,bkxd->bhqxd", (B, H, N, 2, 4), (B, N, 2, 4), (B, N, 2, 4), (0,)),
    "grouped": Case("bghqxd,bhkxd->bghqk", "bghqk,bhkxd->bqghxd", (B, 2, H, N, 2, 4), *same((B, H, N, 2, 4))[:2]),
    "all-heads-added": Case("bhid,bhjd->bij", "bij,bhjd->bihd", *same((B, H, N, D)), (0, 2), H * D),
    "three-of-value": Case("bqd,bkd->bqk", "bqk,bkxyd->bxqyd", *same((B, N, D))[:2], (B, N, 2, 2, 2), (0, 1)),
    "no-arrow": Case("cd,bd", "bc,cd", (N, D), (5, D), (N, D), (0,)),
    "symbolic-batch-second": Case("hbqd,hbkd->hbqk", "hbqk,hbkd->hbqd", *same((H, B, N, D)), (1, 2)),
    "groups-first": Case("bghqd,bhkd->bghqk", "bghqk,bhkd->bghqd", (B, 3, H, N, D), *same((B, H, N, D))[:2], (0, 2)),
}


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_found_and_unchanged(name, symbolic):
    case = CASES[name]
    given = tensors(case.query, case.key, case.value)
    lengths = case.lengths if symbolic else ()
    report, _ = compiled(lambda q, k, v: case(q, k, v), *given, lengths=lengths)
    assert len(report.sites) == 1, report.missed
    assert f"D {case.head_dim}" in report.sites[0].layout
    assert "softmax" not in report.graph()


@pytest.mark.parametrize("name", ["tied-rows", "apart", "grouped"])
def test_gradients(name):
    case = CASES[name]
    given = [tensor.requires_grad_() for tensor in tensors(case.query, case.key, case.value)]
    torch._dynamo.reset()
    fast = torch.compile(lambda q, k, v: case(q, k, v), backend="effattn", options={"rest": "eager", "strict": True})
    expected = case(*given)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    wanted = torch.autograd.grad(expected, given, weight)
    for got, want in zip(torch.autograd.grad(fast(*given), given, weight), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_packed_and_masked():
    """Views between a projection and the product, and a causal mask."""

    def call(x):
        q, k, v = x.view(B, N, 3, H, 2, 4).unbind(2)
        scores = einsum("bihxd,bjhxd->bhij", q * 0.3, k)
        scores = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
        return einsum("bhij,bjhxd->bihxd", scores.softmax(-1), v).reshape(B, N, -1)

    report, _ = compiled(call, *tensors((B, N, 3 * H * D)))
    assert [(site.predicate, site.score) for site in report.sites] == [("k <= q", "0.3*s")]


def broadcast_in_the_sum(q, k, v):
    return einsum("bhij,bhjd->bhid", einsum("bhixd,bhjxd->bhij", q, k[..., :1]).softmax(-1), v)


def summed_over_one_alone(q, k, v):
    return einsum("bhij,bhjd->bhid", einsum("bhixd,bhjd->bhij", q, k[..., 0, :]).softmax(-1), v)


def heads_added_after(q, k, v):
    return einsum("bhij,bhjd->bid", einsum("bhixd,bhjxd->bhij", q, k).softmax(-1), v)


@pytest.mark.parametrize("call", [broadcast_in_the_sum, summed_over_one_alone, heads_added_after])
def test_what_is_not_one_attention(call):
    report, _ = compiled(call, *tensors((B, H, N, 2, 4), (B, H, N, 2, 4), (B, H, N, D)))
    assert report.sites == []


def test_a_part_of_symbolic_size_is_named():
    case = CASES["both-in-two"]
    report, _ = compiled(lambda q, k, v: case(q, k, v), *tensors(case.query, case.key, case.value), lengths=(3, 4))
    assert "symbolic size" in report.missed[0].reason

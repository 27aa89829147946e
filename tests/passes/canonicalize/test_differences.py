"""Sums of attention weights before the product with value: one attention for each summand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

B, H, N, D = 2, 3, 11, 8


def tensors(grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, N, D)] * 5 + [(H, 1, 1)]
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for shape in shapes]


def weights(q, k):
    return (q @ k.mT * 0.3 + torch.full((N, N), -torch.inf, dtype=q.dtype).triu(1)).softmax(-1)


def difference(q, k, p, r, v, x):
    return (weights(q, k) - 0.4 * weights(p, r)) @ v


def factor_of_each_head(q, k, p, r, v, x):
    return torch.matmul(weights(q, k) - weights(p, r) * x, v)


def factor_of_each_row(q, k, p, r, v, x):
    return (weights(q, k) * p[..., :1].sigmoid() + weights(p, r)) @ v


def factor_that_is_learned(q, k, p, r, v, x):
    return torch.matmul(weights(q, k) - torch.exp(x.sum()) * weights(p, r), v)


def three(q, k, p, r, v, x):
    return (0.5 * weights(q, k) + weights(p, r) - weights(q, r)) @ v


def dropout_that_does_nothing(q, k, p, r, v, x):
    return F.dropout(weights(q, k) - weights(p, r), 0.3, training=False) @ v


def folded_batch(q, k, p, r, v, x):
    flat = [part.flatten(0, 1) for part in (q, k, p, r, v)]
    return torch.bmm(weights(*flat[:2]) - 0.3 * weights(*flat[2:4]), flat[4])


def neighbouring_heads(q, k, p, r, v, x):
    """The published code: one softmax, of which every second head is subtracted from the one before."""
    w = weights(torch.cat([q, p], 1), torch.cat([k, r], 1)).float().type_as(q).view(B, H, 2, N, N)
    return torch.matmul(w[:, :, 0] - x * w[:, :, 1], v)


def halves_of_the_heads(q, k, p, r, v, x):
    w = F.softmax(torch.cat([q, p], 1) @ torch.cat([k, r], 1).mT + torch.full((N, N), -torch.inf).triu(1), dim=-1)
    w = w.unflatten(1, (2, H))
    return (w.select(1, 0) - 0.3 * w.select(1, 1)) @ v


def grouped(q, k, p, r, v, x):
    key = torch.cat([k, r], 1)[:, :2].repeat_interleave(3, 1)  # heads in threes, taken apart in twos
    w = weights(torch.cat([q, p], 1), key).view(B, H, 2, N, N)
    return (w[:, :, 0] - w[:, :, 1]) @ v


def output_multiplied_again(q, k, p, r, v, x):
    out = (weights(q, k) - 0.4 * weights(p, r)) @ v
    return out @ v.mT[..., :5], (weights(q, r) + weights(p, k)) @ out


SUMS = (
    output_multiplied_again,
    neighbouring_heads,
    grouped,
    halves_of_the_heads,
    difference,
    factor_of_each_head,
    factor_of_each_row,
    factor_that_is_learned,
    three,
    dropout_that_does_nothing,
    folded_batch,
)
SITES = {three: 3, output_multiplied_again: 4}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("function", SUMS, ids=lambda function: function.__name__)
def test_each_summand_is_a_site(function, grad):
    given = tensors(grad)
    report, _out = compiled(function, *given, verify=not grad)
    assert report.missed == []
    assert [site.predicate for site in report.sites] == ["k <= q"] * SITES.get(function, 2)
    assert "softmax" not in report.graph()
    if grad:
        wanted = torch.autograd.grad(total(function(*given)), given, allow_unused=True)
        fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
        found = torch.autograd.grad(total(fast(*given)), given, allow_unused=True)
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want, 1e-4)


def test_neighbouring_heads_where_a_row_sees_nothing():
    """A safe softmax stays one when its heads are taken apart."""

    def function(q, k, p, r, v, x):
        scores = torch.cat([q, p], 1) @ torch.cat([k, r], 1).mT + torch.full((N, N), -torch.inf).triu()
        w = torch._safe_softmax(scores, -1).view(B, H, 2, N, N)
        return (w[:, :, 0] - 0.3 * w[:, :, 1]) @ v

    report, _ = compiled(function, *tensors())
    assert [site.empty_rows for site in report.sites] == ["zero"] * 2


def total(out):
    return sum(part.square().sum() for part in torch.utils._pytree.tree_leaves(out))


def test_autocast_and_half_precision():
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        report, _ = compiled(difference, *given, tolerance=5e-2, verify=False)
    assert len(report.sites) + len(report.missed) >= 2
    report, _ = compiled(difference, *[x.bfloat16() for x in given], tolerance=5e-2, verify=False)
    assert [site.predicate for site in report.sites] == ["k <= q"] * 2


def test_a_checkpoint():
    from torch.utils.checkpoint import checkpoint

    def function(*given):
        return checkpoint(difference, *given, use_reentrant=False)

    report, _ = compiled(function, *tensors(True), verify=False)
    assert [site.predicate for site in report.sites] == ["k <= q"] * 2


def returned(q, k, p, r, v, x):
    both = weights(q, k) - weights(p, r)
    return both @ v, both


def factor_of_each_key(q, k, p, r, v, x):
    return (weights(q, k) - v[..., 0][:, :, None] * weights(p, r)) @ v


def no_product(q, k, p, r, v, x):
    return (weights(q, k) - p[:, :, :, :1].expand(B, H, N, N).softmax(-1)) @ v


def a_tensor_added(q, k, p, r, v, x):
    return (weights(q, k) + x) @ v


def factor_that_changes(q, k, p, r, v, x):
    x = x.clone()
    both = weights(q, k) - x * weights(p, r)
    x.mul_(2)
    return both @ v


def multiplied(q, k, p, r, v, x):
    return (weights(q, k) * weights(p, r)) @ v


def one_of_two_is_returned(q, k, p, r, v, x):
    w = weights(torch.cat([q, p], 1), torch.cat([k, r], 1)).view(B, H, 2, N, N)
    return (w[:, :, 0] - w[:, :, 1]) @ v, w[:, :, 1]


def of_rows(q, k, p, r, v, x):
    w = weights(q, k)
    return (w[:, :, :5] - w[:, :, 5:10]) @ v


def added_without_gradients(q, k, p, r, v, x):
    with torch.no_grad():
        both = weights(q, k) + 0.3 * weights(p, r)
    return both @ v


LEFT = (
    returned,
    factor_of_each_key,
    no_product,
    a_tensor_added,
    factor_that_changes,
    multiplied,
    one_of_two_is_returned,
    of_rows,
)


@pytest.mark.parametrize("function", [*LEFT, added_without_gradients], ids=lambda function: function.__name__)
def test_left_as_it_was(function):
    given = tensors(function is added_without_gradients)
    report, _ = compiled(function, *given, verify=False)
    assert report.sites == []
    assert report.missed != []
    assert report.graph() == report.graph(before=True)

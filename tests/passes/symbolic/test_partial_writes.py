"""Writes to a part of the scores, or of a mask, before they are read."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled
from small import INF, B, D, H, tensors

N = 7


def given():
    return tensors((B, H, N, D), (B, H, N, D), (B, H, N, D), (B, H, N - 1, N - 1))


def attended(scores, v):
    return scores.softmax(-1) @ v


def added_to_the_rest(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[:, :, 1:, 1:] += bias
    return attended(scores, v)


def decomposed(q, k, v, bias):
    """MViTv2: rows and columns of an image apart, the class token without a position."""
    scores = q @ k.mT * 0.3
    rows, columns = bias[..., :3].view(B, H, 3, 2, 3), bias[..., 3:5].view(B, H, 3, 2, 2)
    scores[:, :, 1:, 1:] = (
        scores[:, :, 1:, 1:].view(B, -1, 3, 2, 3, 2) + rows[..., None] + columns[:, :, :, :, None, :]
    ).view(B, -1, 6, 6)
    return attended(scores, v)


def twice(q, k, v, bias):
    scores = q @ k.mT
    scores[:, :, 1:] *= 0.5
    scores[:, :, :, 1:] += bias[:, :, :1].mean()
    return attended(scores, v)


def by_narrow_and_select(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores.narrow(3, 0, 2).add_(3.0)
    scores.select(-1, 4).fill_(-INF)
    return attended(scores, v)


def a_column_hidden(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[:, :, :, 0] = -INF
    return attended(scores, v)


def the_last_hidden(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[..., -2:] = -1e9
    return attended(scores, v)


def a_part_masked(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[..., 1:].masked_fill_(torch.ones(N, N - 1, dtype=torch.bool).triu(1), -INF)
    return attended(scores, v)


def chosen_by_a_mask(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[torch.ones(N, N, dtype=torch.bool).triu(1).expand(B, H, N, N)] = -INF
    return attended(scores, v)


def a_mask_in_parts(q, k, v, bias):
    mask = torch.zeros(N, N)
    mask[:, 5:] = -INF
    mask[2] = 0.0
    return attended(q @ k.mT * 0.3 + mask, v)


def a_boolean_mask_in_parts(q, k, v, bias):
    seen = torch.zeros(N, N, dtype=torch.bool)
    seen[:, :3] = True
    seen[2:4, 3:5] = True
    return attended((q @ k.mT * 0.3).masked_fill(~seen, -INF), v)


def one_head_scaled(q, k, v, bias):
    scores = q @ k.mT * 0.3
    scores[:, 0] = scores[:, 0] * 0.5
    return attended(scores, v)


def one_head_biased(q, k, v, bias):
    scores = q @ k.mT
    scores[:, -1] += torch.arange(N)
    return attended(scores, v)


def one_row_and_one_column(q, k, v, bias):
    scores = q @ k.mT
    scores[:, :, 2].mul_(0.5)
    scores[..., 0] -= 2
    return attended(scores, v)


def one_batch_masked(q, k, v, bias):
    scores = q @ k.mT
    scores[1] = scores[1].masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -INF)
    return attended(scores, v)


def one_head_of_batch_and_heads_together(q, k, v, bias):
    scores = q.flatten(0, 1) @ k.flatten(0, 1).mT
    scores[3] *= 0.5
    return attended(scores, v.flatten(0, 1))


def one_head_of_another(q, k, v, bias):
    """What is written comes from another place: that is no attention over one product."""
    scores = q @ k.mT
    scores[:, 0] = scores[:, 1] * 0.5
    return attended(scores, v)


READ = {
    one_head_scaled: ("true", "Where(h == 0, 0.15*s, 0.3*s)"),
    one_head_biased: ("true", f"Where(h == {H - 1}, s + k, s)"),
    one_row_and_one_column: ("true", ""),
    one_batch_masked: ("b != 1 | k <= q", "s"),
    one_head_of_batch_and_heads_together: ("true", ""),
    added_to_the_rest: ("true", "Where(1 <= k & 1 <= q, 0.3*s + bias[b, h, -1 + q, -1 + k], 0.3*s)"),
    decomposed: ("true", ""),
    twice: ("true", ""),
    by_narrow_and_select: ("k != 4", "Where(k < 2, 3 + 0.3*s, 0.3*s)"),
    a_column_hidden: ("k != 0", "0.3*s"),
    the_last_hidden: ("k < 5", "0.3*s"),
    a_part_masked: ("k <= 1 + q", "0.3*s"),
    chosen_by_a_mask: ("k <= q", "0.3*s"),
    a_mask_in_parts: ("q == 2 | k < 5", "0.3*s"),
    a_boolean_mask_in_parts: ("", "0.3*s"),
}


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize("call", READ, ids=lambda call: call.__name__)
def test_read_and_unchanged(call, target):
    predicate, score = READ[call]
    report, _ = compiled(call, *given(), target=target)
    (site,) = report.sites
    assert report.missed == []
    assert predicate in ("", site.predicate)
    assert score in ("", site.score)
    assert not any(word in report.graph() for word in ("softmax", "matmul", "setitem"))


@pytest.mark.parametrize("call", [added_to_the_rest, the_last_hidden, chosen_by_a_mask], ids=lambda call: call.__name__)
def test_gradients_with_symbolic_batch(call):
    q, k, v, bias = given()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    torch._dynamo.reset()
    fast = torch.compile(call, backend="effattn", options={"rest": "eager", "strict": True})
    wanted = call(*leaves, bias)
    weight = torch.linspace(-1, 1, wanted.numel()).view_as(wanted)
    for tensor in (*leaves, bias):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    for got, want in zip(
        torch.autograd.grad(fast(*leaves, bias), leaves, weight),
        torch.autograd.grad(wanted, leaves, weight),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def at_places_that_are_data(q, k, v, bias):
    scores = q @ k.mT
    scores[:, :, (bias[0, 0, 0] > 0).long()] += 1.0
    return attended(scores, v)


def of_one_head(q, k, v, bias):
    scores = q @ k.mT
    scores[:, 1] += 1.0
    return attended(scores, v)


def in_steps(q, k, v, bias):
    scores = q @ k.mT
    scores[..., ::2] += 1.0
    return attended(scores, v)


def after_they_were_read(q, k, v, bias):
    scores = q @ k.mT
    scores[..., 1:] += 1.0
    out = attended(scores, v)
    scores[..., :1] += 1.0
    return out, scores.sum()


def through_a_view_taken_before(q, k, v, bias):
    scores = q @ k.mT
    part = scores[..., 1:]
    scores.mul_(0.5)
    part.add_(1.0)
    return attended(scores, v)


def through_an_expanded_view(q, k, v, bias):
    mask = torch.zeros(N, 1)
    wide = mask.expand(N, N)
    wide[1:, 0] -= 3.0
    return attended(q @ k.mT + wide, v)


OTHERS = [
    *(at_places_that_are_data, of_one_head, one_head_of_another, in_steps, after_they_were_read),
    *(through_a_view_taken_before, through_an_expanded_view),
]


@pytest.mark.parametrize("call", OTHERS, ids=lambda call: call.__name__)
def test_unchanged_whether_it_is_read_or_not(call):
    compiled(call, *given())


def test_rounding_of_what_is_written():
    def call(q, k, v, bias):
        scores = q @ k.mT
        scores[:, :, 1:, 1:] = bias.float() * 3 + scores[:, :, 1:, 1:].float()
        return attended(scores, v)

    compiled(call, *[tensor.bfloat16() for tensor in given()], tolerance=2e-2)

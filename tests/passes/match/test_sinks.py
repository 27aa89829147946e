"""Sinks: a column of the softmax that takes weight and has no value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

B, H, KV, N, D = 2, 4, 2, 21, 8


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, D), (B, KV, N, D), (B, KV, N, D), (H,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def logits(q, k, mask=None):
    scores = q @ k.repeat_interleave(H // KV, 1).mT * 0.3
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores if mask is None else scores + mask


def column(sinks):
    return sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)


def finished(weights, v):
    return weights @ v.repeat_interleave(H // KV, 1)


def plain(q, k, v, sinks):
    return finished(torch.cat([logits(q, k), column(sinks)], -1).softmax(-1)[..., :-1], v)


def shifted(q, k, v, sinks):
    both = torch.cat([logits(q, k), column(sinks)], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return finished(torch.softmax(both, dim=-1, dtype=both.dtype)[..., :-1], v)


def shifted_by_amax(q, k, v, sinks):
    both = torch.cat([logits(q, k), column(sinks)], dim=3)
    return finished((both - both.amax(-1, keepdim=True)).softmax(3)[:, :, :, :-1], v)


def joined_before_a_cast(q, k, v, sinks):
    both = torch.cat([logits(q, k), column(sinks)], -1).to(q.dtype).float()
    return finished(both.softmax(-1)[..., :-1].to(q.dtype), v)


def padded(q, k, v, sinks):
    return finished(F.pad(logits(q, k), (0, 1)).softmax(-1)[..., :-1], v) + sinks.sum()


def padded_by_a_value(q, k, v, sinks):
    return finished(F.pad(logits(q, k), [0, 1], value=-1.5).softmax(-1)[..., :-1], v) + sinks.sum()


def without_a_sink(q, k, v, sinks):
    scores = logits(q, k)
    return finished((scores - torch.amax(scores, 3, True)).softmax(-1), v) + sinks.sum()


def first(q, k, v, sinks):
    """x-transformers"""
    return finished(torch.cat([column(sinks), logits(q, k)], -1).softmax(-1)[..., 1:], v)


def several(q, k, v, sinks):
    columns = torch.stack([sinks, 1 - sinks, sinks * 0.5], -1).view(1, H, 1, 3).expand(B, H, N, 3)
    return finished(torch.cat([logits(q, k), columns], -1).softmax(-1)[..., :N], v)


def several_first(q, k, v, sinks):
    columns = torch.stack([sinks, -sinks], -1).view(1, H, 1, 2).expand(B, H, N, 2)
    weights = torch.cat([columns, logits(q, k)], -1).softmax(-1)
    return finished(weights.clone().narrow(-1, 2, N), v)


def padded_in_front(q, k, v, sinks):
    return finished(F.pad(logits(q, k), (1, 0)).softmax(-1)[..., 1:], v) + sinks.sum()


def padded_by_two(q, k, v, sinks):
    return finished(F.pad(logits(q, k), (0, 2), value=0.5).softmax(-1)[..., :-2], v) + sinks.sum()


SPELLINGS = (
    *(plain, shifted, shifted_by_amax, joined_before_a_cast, padded, padded_by_a_value, without_a_sink),
    *(first, several, several_first, padded_in_front, padded_by_two),
)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.__name__)
def test_read_and_unchanged(spelling):
    report, _ = compiled(spelling, *tensors())
    (site,) = report.sites
    assert (site.predicate, site.score) == ("k <= q", "0.3*s")
    assert report.missed == []
    assert any("sink" in note for note in site.notes) == (spelling is not without_a_sink)
    assert "softmax" not in report.graph()


def test_rows_that_see_nothing_give_their_weight_to_the_sink():
    lowest = torch.zeros(B, 1, 1, N)
    lowest[0, ..., :5] = torch.finfo(torch.float32).min

    def call(q, k, v, sinks, mask):
        return finished(torch.cat([logits(q, k, mask), column(sinks)], -1).softmax(-1)[..., :-1], v)

    report, out = compiled(call, *tensors(), lowest)
    assert len(report.sites) == 1
    assert (out[0, :, :5] == 0).all()


@pytest.mark.parametrize("spelling", [shifted, first, several], ids=lambda spelling: spelling.__name__)
def test_gradients_reach_the_sinks(spelling):
    given = [tensor.requires_grad_() for tensor in tensors()]
    weight = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(spelling(*given), given, weight)
    torch._dynamo.reset()
    fast = torch.compile(spelling, backend="effattn", options={"rest": "eager", "strict": True})
    for got, want in zip(torch.autograd.grad(fast(*given), given, weight), wanted, strict=True):
        assert_close(got, want, 1e-4)


def test_half_precision():
    given = tensors(torch.bfloat16)
    for spelling in (joined_before_a_cast, shifted):
        report, out = compiled(spelling, *given, tolerance=2e-2)
        assert len(report.sites) == 1
    assert_close(out.float(), shifted(*(x.float() for x in given)), 2e-2)


def test_a_window_keeps_the_sink():
    policy = {"rule": [{"forms": ["window"], "params": {"window": {"window": 6, "sinks": 0}}}]}
    q, k, v, sinks = tensors()
    report, out = compiled(plain, q, k, v, sinks, policy=policy)
    assert report.sites[0].form == "window"
    far = torch.ones(N, N, dtype=torch.bool).tril(-6)
    scores = logits(q, k).masked_fill(far, -torch.inf)
    wanted = finished(torch.cat([scores, column(sinks)], -1).softmax(-1)[..., :-1], v)
    assert_close(out, wanted)


def test_linear_attention_has_no_place_for_a_sink():
    policy = {"rule": [{"forms": ["linear"], "params": {"linear": {"tolerance": 2.0}}}]}
    report, _ = compiled(plain, *tensors(), policy=policy, strict=False)
    assert report.sites[0].form == "exact"
    assert "sink" in report.sites[0].reason


def kept(q, k, v, sinks):
    weights = torch.cat([logits(q, k), column(sinks)], -1).softmax(-1)
    return weights @ torch.cat([v, v[:, :, :1]], 2).repeat_interleave(H // KV, 1)


def first_kept(q, k, v, sinks):
    return finished(torch.cat([column(sinks), logits(q, k)], -1).softmax(-1)[..., :-1], v)


def on_both_sides(q, k, v, sinks):
    return finished(F.pad(logits(q, k), (1, 1)).softmax(-1)[..., 1:-1], v)


def in_steps(q, k, v, sinks):
    return finished(torch.cat([logits(q, k), logits(q, k)], -1).softmax(-1)[..., ::2], v)


def two_dropped(q, k, v, sinks):
    both = torch.cat([logits(q, k), column(sinks)], -1)
    return finished(both.softmax(-1)[..., :-2], v[:, :, :-1])


def rounded_after_joining(q, k, v, sinks):
    both = torch.cat([logits(q, k), column(sinks)], -1).bfloat16().float()
    return finished(both.softmax(-1)[..., :-1], v)


NO_SINKS = [kept, first_kept, on_both_sides, in_steps, two_dropped, rounded_after_joining]


@pytest.mark.parametrize("spelling", NO_SINKS, ids=lambda spelling: spelling.__name__)
def test_what_is_no_sink_is_left_alone(spelling):
    report, _ = compiled(spelling, *tensors())
    assert report.sites == []
    assert len(report.missed) == 1


def test_null_keys_with_a_value_are_keys_before_the_others():
    """x-transformers' ``num_null_kv``: one more key, which every row sees."""

    def call(q, k, v, null):
        k, v = (torch.cat([null.expand(B, H, 2, D), x.repeat_interleave(H // KV, 1)], 2) for x in (k, v))
        scores = q @ k.mT * 0.3
        seen = F.pad(torch.ones(N, N, dtype=torch.bool).tril(), (2, 0), value=True)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v

    report, _ = compiled(call, *tensors()[:3], torch.randn(H, 2, D, generator=torch.Generator().manual_seed(3)))
    assert [site.predicate for site in report.sites] == ["k <= 2 + q"]

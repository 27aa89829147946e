"""What looks as if it could not be rewritten, or reads unlike attention, is found and gives the same."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled
from small import INF, MIN, B, D, H, N, qkv


def scores_used_elsewhere(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores.mean()


def scores_made_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.25
    scores += torch.full((N, N), -INF).triu(1)
    return scores.softmax(-1) @ v


def query_scaled_in_place(q, k, v):
    q = q.clone()
    q.mul_(0.5)
    return (q @ k.mT).softmax(-1) @ v


def query_written_before(q, k, v):
    q[:, :, 0] = 0
    return (q @ k.mT).softmax(-1) @ v


def key_written_after(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    k.zero_()
    return out


def value_written_between(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    v[:, :, 0] = 1
    return weights @ v


def one_key(q, k, v):
    return (q @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1]


def one_query(q, k, v):
    seen = torch.arange(N)[None] <= torch.tensor([4])[:, None]
    return (q[:, :, :1] @ k.mT).masked_fill(~seen, -INF).softmax(-1) @ v


def product_in_place_of_the_weights(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(q, torch.bmm(q, k.mT).softmax(-1), v, beta=0)


def all_from_one_tensor(q, k, v):
    q, k, v = torch.cat([q, k, v], -1).chunk(3, -1)
    return (q @ k.mT).softmax(-1) @ v


def all_unbound(q, k, v):
    q, k, v = torch.stack([q, k, v]).unbind(0)
    return (q @ k.mT).softmax(-1) @ v


def output_changed_in_place(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    out += q
    return out


def output_viewed_as_it_was_laid_out(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).view(B, H * N, D)


def output_viewed_after_transposes(q, k, v):
    out = (q @ k.mT).masked_fill(torch.ones(N, N).triu(4) > 0, -INF).softmax(-1) @ v
    return out.transpose(1, 2).transpose(1, 2).view(B, H * N, D)


def output_as_strided(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT).softmax(-1) @ v).as_strided((B, H), (H * N * D, N * D))


def more_queries_than_keys(q, k, v):
    k, v = k[:, :, :4], v[:, :, :4]
    seen = torch.arange(4)[None] <= torch.arange(N)[:, None] + (4 - N)
    return (q @ k.mT).masked_fill(~seen, MIN).softmax(-1) @ v


def more_queries_than_keys_infinite(q, k, v):
    k, v = k[:, :, :4], v[:, :, :4]
    seen = torch.arange(4)[None] <= torch.arange(N)[:, None] + (4 - N)
    return (q @ k.mT).masked_fill(~seen, -INF).softmax(-1) @ v


def floor_of_the_query(q, k, v):
    return (torch.div(q, 0.5, rounding_mode="floor") @ k.mT).softmax(-1) @ v


def mask_inside_tanh(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, -INF)
    return (5 * torch.tanh(scores / 5)).softmax(-1) @ v


def fill_of_ten_thousand(q, k, v):
    mask = torch.ones(N, N).tril()
    return ((q @ k.mT) * mask - 1e4 * (1 - mask)).softmax(-1) @ v


def grouped_scores_in_five_dimensions(q, k, v):
    q = torch.cat([q, q + 1], 1).view(B, H, 2, N, D)
    return ((q @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)


def grouped_scores_split_and_merged(q, k, v):
    k, v = (x[:, :, None].expand(B, H, 2, N, D).reshape(B, 2 * H, N, D) for x in (k, v))
    scores = torch.cat([q, q + 1], 1) @ k.mT
    return scores.view(B, H, 2, N, N).softmax(-1).view(B, 2 * H, N, N) @ v


def heads_repeated_in_turn(q, k, v):
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return (torch.cat([q, q + 1], 1) @ k.mT).softmax(-1) @ v


def one_key_head(q, k, v):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


def batch_and_heads_in_one(q, k, v):
    padding = torch.arange(N) < torch.tensor([[N], [5]])
    mask = padding.repeat_interleave(H, 0)[:, None]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).masked_fill(~mask, -INF).softmax(-1), v).view(B, H, N, D)


def key_and_value_are_one(q, k, v):
    return (q @ k.mT).softmax(-1) @ k


def scores_in_float32(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    scores = (q.float() @ k.float().mT) * 0.3 + torch.full((N, N), MIN).triu(1)
    return scores.softmax(-1).to(v.dtype) @ v


def scaled_in_float32(q, k, v):
    q, k, v = (x.half() for x in (q, k, v))
    return ((q.to(torch.float32) * 0.3) @ k.to(torch.float32).mT).softmax(-1).type_as(v) @ v


RIGHT = [
    scores_used_elsewhere, scores_made_in_place, query_scaled_in_place, query_written_before, key_written_after,
    value_written_between, one_key, one_query, product_in_place_of_the_weights, all_from_one_tensor, all_unbound,
    output_changed_in_place, output_viewed_as_it_was_laid_out, output_viewed_after_transposes, output_as_strided,
    more_queries_than_keys, more_queries_than_keys_infinite, floor_of_the_query, mask_inside_tanh,
    fill_of_ten_thousand, grouped_scores_in_five_dimensions, grouped_scores_split_and_merged, heads_repeated_in_turn,
    one_key_head, batch_and_heads_in_one, key_and_value_are_one,
    scores_in_float32, scaled_in_float32,
]  # fmt: skip


@pytest.mark.parametrize("function", RIGHT, ids=lambda function: function.__name__)
def test_found_and_right(function):
    report, _ = compiled(function, *qkv(), tolerance=1e-2 if "float32" in function.__name__ else 2e-5)
    assert len(report.sites) == 1, report.missed


def test_the_last_rows_see_themselves_wherever_they_stand():
    """Positions are data, but a row's own key is its own whatever they hold: no row is empty."""

    def call(q, k, v, places):
        hidden = (places[:, None, :] > places[:, -q.shape[2] :, None])[:, None]
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        return (q @ k.mT + hidden.to(q.dtype) * -10000.0).softmax(-1) @ v

    q, k, v = qkv()
    report, _ = compiled(call, q[:, :, :4], k, v, torch.arange(N).repeat(B, 1) + 7, tolerance=2e-2)
    assert len(report.sites) == 1, report.missed

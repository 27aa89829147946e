"""What must not be rewritten is left alone, with a reason that a user understands; what only looks so is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled

B, H, N, D = 2, 3, 11, 8
MIN = torch.finfo(torch.float32).min
INF = float("inf")


def tensors(*shapes, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (B, H, N, D)), generator=generator) for shape in shapes]


def qkv():
    return tensors((), (), ())


# -- left alone: the reason -----------------------------------------------------------------------------------------


def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def weights_used_twice(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights @ k


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def softmax_by_hand_over_queries(q, k, v):
    e = (q @ k.mT).exp()
    return e / e.sum(2, keepdim=True) @ v


def router(q, k, v):
    gates = F.softmax(q.mean(-1) + k.mean(-1), dim=-1)
    return gates[..., None] * v


def classifier(q, k, v):
    return F.softmax(F.linear(q, k[0, 0]), dim=-1)


def weights_masked(q, k, v):
    return ((q @ k.mT).softmax(-1) * torch.ones(N, N).tril()) @ v


def weights_masked_in_place(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0
    return weights @ v


def weights_changed_through_a_view(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    weights.view(-1).mul_(0.5)
    return weights @ v


def weights_of_the_best(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights.masked_fill(weights < weights.topk(3).values[..., -1:], 0) @ v


def weights_normalised_again(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def scores_of_the_best(q, k, v):
    scores = q @ k.mT
    return scores.masked_fill(scores < scores.topk(3).values[..., -1:], -INF).softmax(-1) @ v


def nan_as_fill(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, float("nan")).softmax(-1) @ v


def infinity_as_fill(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(N, N).triu(1) > 0, INF).softmax(-1) @ v


def nothing_allowed(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(N, N, dtype=torch.bool), -INF).softmax(-1) @ v


def zero_times_infinity(q, k, v):
    return (q @ k.mT + (1 - torch.ones(N, N).tril()) * -INF).softmax(-1) @ v


def result_added(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(q, torch.bmm(q, k.mT).softmax(-1), v)


def result_written_to_a_buffer(q, k, v):
    buffer = torch.zeros(B, H, N, D)
    torch.matmul((q @ k.mT).softmax(-1), v, out=buffer)
    return buffer * 2


def unknown_operation(q, k, v):
    return torch.erf(q @ k.mT).softmax(-1) @ v


def rounded_scores(q, k, v):
    return (q @ k.mT).round().softmax(-1) @ v


def scores_as_bits(q, k, v):
    return (q @ k.mT).view(torch.int32).view(torch.float32).softmax(-1) @ v


def scores_in_eight_bits(q, k, v):
    return (q @ k.mT).to(torch.float8_e4m3fn).to(torch.float32).softmax(-1) @ v


def scores_of_pieces(q, k, v):
    return torch.cat([q @ k[:, :, :5].mT, q @ k[:, :, 5:].mT], dim=-1).softmax(-1) @ v


def scores_of_pieces_of_rows(q, k, v):
    return torch.cat([q[:, :, :5] @ k.mT, q[:, :, 5:] @ k.mT], dim=-2).softmax(-1) @ v


def scores_set(q, k, v):
    scores = q @ k.mT
    scores[..., 0] = -INF
    return scores.softmax(-1) @ v


def scores_changed_through_a_view(q, k, v):
    scores = q @ k.mT
    torch.atleast_2d(scores).mul_(2)
    return scores.softmax(-1) @ v


def scores_changed_by_a_function_in_place(q, k, v):
    scores = q @ k.mT
    F.relu(scores, True)
    return scores.softmax(-1) @ v


def scores_changed_through_a_piece(q, k, v):
    scores = q @ k.mT
    first, _ = scores.split([1, H - 1], dim=1)
    first.add_(5)
    return scores.softmax(-1) @ v


def whole_numbers(q, k, v):
    return ((q * 3).int() @ (k * 3).int().mT).float().softmax(-1) @ v


def double(q, k, v):
    return (q.double() @ k.double().mT).softmax(-1) @ v.double()


def double_with_batch_and_heads_in_one(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    return (q @ k.mT).flatten(0, 1).softmax(-1).unflatten(0, (B, H)) @ v


def mixed_types(q, k, v):
    return (q @ k.mT).softmax(-1).bfloat16() @ v.bfloat16()


def no_keys(q, k, v):
    return (q @ k[:, :, :0].mT).softmax(-1) @ v[:, :, :0]


def key_written_before_the_product_with_value(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    k.zero_()
    return weights @ v


def query_written_before_the_product_with_value(q, k, v):
    weights = (q.transpose(1, 2).transpose(1, 2) @ k.mT).softmax(-1)
    q[0].add_(1)
    return weights @ v


def value_is_the_scores_memory(q, k, v):
    scores = q @ k.mT
    weights = scores.softmax(-1)
    k.copy_(v)
    return weights @ v


def live_dropout(q, k, v):
    torch.manual_seed(0)
    return F.dropout((q @ k.mT).softmax(-1), p=0.5, training=True) @ v


def live_dropout_in_sdpa(q, k, v):
    torch.manual_seed(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def fill_scaled_by_data_in_float16(q, k, v):
    """-65504 times more than one is -inf: rows without keys are NaN in some heads, and a mean in others."""
    scores = (q.half() @ k.half().mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] - 3, -65504.0)
    return (scores * q[0, :, :1, :1].half().exp()).softmax(-1) @ v.half()


def ten_thousand_added_and_scaled_in_float16(q, k, v):
    hidden = (torch.arange(N) > torch.arange(N)[:, None] - 3).half() * -10000.0
    return ((q.half() @ k.half().mT + hidden) / 3.0).softmax(-1) @ v.half()


def ten_thousand_added_in_bfloat16(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    seen = (torch.arange(N) < torch.tensor([[N], [0]]))[:, None, None]
    return (q @ k.mT + (1.0 - seen.to(q.dtype)) * -10000.0).softmax(-1) @ v


def fills_of_two_kinds(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] - 3, -1e9)
    return scores.masked_fill(torch.arange(N) < 2, MIN).softmax(-1) @ v


LEFT_ALONE = {
    weights_returned: "the attention weights are used elsewhere",
    weights_used_twice: "the attention weights are used elsewhere (by matmul_1, matmul_2)",
    softmax_over_queries: "the product after softmax does not run over the keys",
    softmax_over_heads: "the softmax does not run over the keys",
    softmax_by_hand_over_queries: "the product after softmax does not run over the keys",
    router: "the scores do not come from a product of two tensors: not attention",
    classifier: "not attention",
    weights_masked: "mul stands between softmax and value",
    weights_masked_in_place: "the attention weights are used elsewhere (by setitem",
    weights_changed_through_a_view: "the attention weights are used elsewhere",
    weights_of_the_best: "the attention weights are used elsewhere",
    weights_normalised_again: "the attention weights are used elsewhere",
    scores_of_the_best: "the mask depends on the scores themselves",
    nan_as_fill: "NaN in a mask or score",
    infinity_as_fill: "the score is not finite",
    nothing_allowed: "the mask allows nothing at all",
    zero_times_infinity: "-inf stands where it is not a mask",
    result_added: "baddbmm adds a tensor to the product of weights and value",
    result_written_to_a_buffer: "matmul writes its result into another tensor (out=)",
    unknown_operation: "erf stands between the product of query and key and softmax and has no symbolic meaning",
    rounded_scores: "round stands between",
    scores_as_bits: "view stands between",
    scores_in_eight_bits: "to stands between",
    scores_of_pieces: "rows where the scores have",
    scores_of_pieces_of_rows: "rows where the scores have",
    scores_set: "setitem writes into the scores before softmax",
    scores_changed_through_a_view: "mul_ writes into the scores before softmax",
    scores_changed_by_a_function_in_place: "relu writes into the scores before softmax",
    scores_changed_through_a_piece: "add_ writes into the scores before softmax",
    whole_numbers: "the layout of query is not understood",
    double: "attention in torch.float64 is not supported",
    double_with_batch_and_heads_in_one: "attention in torch.float64 is not supported",
    mixed_types: "query, key and value mix torch.bfloat16, torch.float32",
    no_keys: "a length is 0",
    key_written_before_the_product_with_value: "key is written between the scores and the output",
    query_written_before_the_product_with_value: "query is written between the scores and the output",
    value_is_the_scores_memory: "key is written between the scores and the output",
    live_dropout: "attention dropout p=0.5 is live",
    live_dropout_in_sdpa: "attention dropout p=0.5 is live",
    fill_scaled_by_data_in_float16: "a fill value is scaled by data in float16",
    ten_thousand_added_and_scaled_in_float16: "a row may attend to nothing, and a large number",
    ten_thousand_added_in_bfloat16: "a row may attend to nothing, and a large number",
    fills_of_two_kinds: "a row may attend to nothing",
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_left_alone(function):
    reason = LEFT_ALONE[function]
    report, _ = compiled(function, *qkv())
    assert report.sites == [], report.sites
    (missed,) = report.missed
    assert reason in missed.reason
    assert __file__ in missed.location


# -- found, and right -----------------------------------------------------------------------------------------------


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


# -- rows without keys: what the author's arithmetic gives ----------------------------------------------------------

EMPTY = torch.arange(N) < torch.tensor([[N], [0]])  # nothing to see in the second sequence


def bool_in_sdpa(q, k, v, seen):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])


def infinity_in_sdpa(q, k, v, seen):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(seen, 0.0, -INF)[:, None, None, :])


def lowest_in_sdpa(q, k, v, seen):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(seen, 0.0, MIN)[:, None, None, :])


def infinity_filled(q, k, v, seen):
    return (q @ k.mT).masked_fill(~seen[:, None, None, :], -INF).softmax(-1) @ v


def infinity_added(q, k, v, seen):
    return (q @ k.mT + torch.where(seen, 0.0, -INF)[:, None, None, :]).softmax(-1) @ v


def lowest_filled(q, k, v, seen):
    return (q @ k.mT).masked_fill(~seen[:, None, None, :], MIN).softmax(-1) @ v


def lowest_added(q, k, v, seen):
    return (q @ k.mT + torch.where(seen, 0.0, MIN)[:, None, None, :]).softmax(-1) @ v


def billion_filled_and_divided_by_hand(q, k, v, seen):
    e = (q @ k.mT).masked_fill(~seen[:, None, None], -1e9).exp()
    return e / e.sum(-1, keepdim=True) @ v


def billion_filled_and_shifted_by_hand(q, k, v, seen):
    scores = (q @ k.mT).masked_fill(~seen[:, None, None], -1e9)
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True) @ v


def billion_filled_and_shifted(q, k, v, seen):
    scores = (q @ k.mT).masked_fill(~seen[:, None, None], -1e9)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1) @ v


def billion_filled(q, k, v, seen):
    return (q @ k.mT).masked_fill(~seen[:, None, None, :], -1e9).softmax(-1) @ v


def billion_added(q, k, v, seen):
    return (q @ k.mT + torch.where(seen, 0.0, -1e9)[:, None, None, :]).softmax(-1) @ v


def billion_added_and_cast(q, k, v, seen):
    mask = (1 - seen[:, None, None, :].to(q.dtype)) * -1e9
    return (mask + q @ k.mT).float().softmax(-1).to(q.dtype) @ v


def billion_added_in_place(q, k, v, seen):
    """As LongT5: a bias of positions and a mask in one, added in place."""
    bias = torch.arange(N) * 0.1 - torch.arange(N)[:, None] * 0.2 + torch.where(seen, 0.0, -1e9)[:, None, None, :]
    scores = (q @ k.mT) * 0.3
    scores += bias
    return scores.float().softmax(-1) @ v


def billion_added_twice(q, k, v, seen):
    scores = q @ k.mT + torch.full((N, N), -1e9).triu(1)
    return (scores + torch.where(seen, 0.0, -1e9)[:, None, None, :]).softmax(-1) @ v


def lowest_of_half(q, k, v, seen):
    return (q @ k.mT).masked_fill(~seen[:, None, None, :], torch.finfo(q.dtype).min).softmax(-1) @ v


def lowest_of_float_in_half(q, k, v, seen):
    mask = torch.where(seen, 0.0, MIN).to(q.dtype)[:, None, None, :]
    return (q @ k.mT + mask).softmax(-1) @ v


def lowest_filled_and_added(q, k, v, seen):
    """As GPT-2 was written: a row that sees nothing takes the mean of what only one of its masks hides."""
    scores = torch.where(torch.ones(N, N).tril() > 0, q @ k.mT, MIN)
    return (scores + torch.where(seen, 0.0, MIN)[:, None, None, :]).softmax(-1) @ v


def billion_filled_and_added(q, k, v, seen):
    scores = torch.where(torch.ones(N, N).tril() > 0, q @ k.mT, -1e9)
    return (scores + torch.where(seen, 0.0, -1e9)[:, None, None, :]).softmax(-1) @ v


def infinite_data(q, k, v, seen):
    return (q @ k.mT + seen[:, None, None, :]).softmax(-1) @ v


def infinite_data_in_sdpa(q, k, v, seen):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])


def is_the_data_infinite(q, k, v, seen):
    return (q @ k.mT).masked_fill((seen == -INF)[:, None, None, :], MIN).softmax(-1) @ v


ROWS = [
    (bool_in_sdpa, "zero", EMPTY, torch.float32),
    (infinity_in_sdpa, "zero", EMPTY, torch.float32),
    (lowest_in_sdpa, "mean", EMPTY, torch.float32),
    (infinity_filled, "nan", EMPTY, torch.float32),
    (infinity_added, "nan", EMPTY, torch.float32),
    (lowest_filled, "mean", EMPTY, torch.float32),
    (lowest_added, "mean", EMPTY, torch.float32),
    (billion_filled, "mean", EMPTY, torch.float32),
    (billion_filled_and_divided_by_hand, "nan", EMPTY, torch.float32),
    (billion_filled_and_shifted_by_hand, "mean", EMPTY, torch.float32),
    (billion_filled_and_shifted, "mean", EMPTY, torch.float32),
    (billion_added, "nan", EMPTY, torch.float32),  # a mean, as the numbers themselves give
    (billion_added_and_cast, "nan", EMPTY, torch.float32),
    (billion_added_and_cast, None, EMPTY, torch.bfloat16),
    (billion_added_in_place, "nan", EMPTY, torch.float32),
    (billion_added_twice, None, EMPTY, torch.float32),
    (lowest_filled_and_added, "nan", EMPTY, torch.float32),
    (lowest_filled_and_added, "nan", torch.arange(N) >= torch.tensor([[0], [5]]), torch.float32),
    (billion_filled_and_added, None, EMPTY, torch.float32),
    (lowest_of_half, "mean", EMPTY, torch.float16),
    (lowest_of_half, "mean", EMPTY, torch.bfloat16),
    (lowest_of_float_in_half, "nan", EMPTY, torch.float16),  # the lowest float32 is -inf in half precision
    (lowest_of_float_in_half, "nan", EMPTY, torch.bfloat16),
    (infinite_data, "nan", torch.where(EMPTY, 0.0, -INF), torch.float32),
    (infinite_data, "nan", torch.where(EMPTY, 0.0, MIN), torch.float32),  # a mean, as the numbers themselves give
    (infinite_data_in_sdpa, "zero", torch.where(EMPTY, 0.0, -INF), torch.float32),
    (infinite_data_in_sdpa, "zero", torch.where(EMPTY, 0.0, MIN), torch.float32),
    (is_the_data_infinite, "mean", torch.where(EMPTY, 0.0, -INF), torch.float32),
]


@pytest.mark.parametrize(
    ("function", "rows", "seen", "dtype"), ROWS, ids=lambda value: getattr(value, "__name__", str(value)[:14])
)
def test_rows_without_keys(function, rows, seen, dtype):
    given = [x.to(dtype) for x in qkv()]
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    report, _ = compiled(function, *given, seen, tolerance=tolerance)
    if rows is None:
        assert "a row may attend to nothing" in report.missed[0].reason
    else:
        assert [site.empty_rows for site in report.sites] == [rows], report.missed


# -- memory: what is read must be what was there --------------------------------------------------------------------


def run_several_times(function, *args: Any, calls: int = 3) -> None:
    """Like the model itself over several calls, its buffers included."""
    from effattn.compiler.backend import effattn

    torch._dynamo.reset()
    expected_args, actual_args = copy.deepcopy(args), copy.deepcopy(args)
    fast = torch.compile(
        function, backend=lambda gm, inputs: effattn(gm, inputs, options={"rest": "eager", "strict": True})
    )
    for _ in range(calls):
        expected, actual = function(*expected_args), fast(*actual_args)
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5, equal_nan=True)
        torch.testing.assert_close(actual_args, expected_args)


def counter_raised_after_the_mask(q, k, v, length):
    i = torch.arange(N)
    mask = i[None] <= i[:, None] % 3 + length
    length.add_(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_read_before_and_after(q, k, v, length):
    i = torch.arange(N)
    late = i[None] >= length - 3
    length.add_(2)
    mask = (i[None] <= i[:, None] + length) & late
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_read_after_and_before(q, k, v, length):
    i = torch.arange(N)
    before = length + 0 * i
    length.add_(2)
    mask = (i[None] <= i[:, None] + length) & (i[None] >= before - 3)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 1, N, N))


def counter_raised_twice(q, k, v, length):
    i = torch.arange(N)
    length.add_(1)
    first = F.scaled_dot_product_attention(q, k, v, attn_mask=(i[None] <= i[:, None] + length).expand(1, 1, N, N))
    length.add_(1)
    mask = (i[None] <= i[:, None] - 4 + length).expand(1, 1, N, N)
    return first + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_changed_through_a_view(q, k, v, mask):
    seen = mask[:, None, None, :]
    scores = (q @ k.mT).masked_fill(~seen, -INF)
    mask.view(-1)[1:].copy_(mask.view(-1)[:-1].clone())
    return scores.softmax(-1) @ v


def slopes_changed_between(q, k, v, slopes):
    scores = q @ k.mT + slopes[:, None, None] * torch.arange(N)
    slopes.mul_(2)
    return scores.softmax(-1) @ v


def other_product_changed_in_place(q, k, v, slopes):
    other = v @ slopes.expand(D, H)[:, :1]  # [B, H, N, 1]: per row, no score of its own
    scores = q @ k.mT + other
    other.mul_(3)
    return scores.softmax(-1) @ v, other


@pytest.mark.parametrize(
    "function",
    [counter_raised_after_the_mask, counter_read_before_and_after, counter_read_after_and_before, counter_raised_twice],
    ids=lambda function: function.__name__,
)
def test_a_counter_is_read_when_the_author_reads_it(function):
    run_several_times(function, *qkv(), torch.tensor(3))
    report, _ = compiled(function, *qkv(), torch.tensor(3))
    assert report.missed == []


def test_data_changed_between_mask_and_attention():
    run_several_times(mask_changed_through_a_view, *qkv(), torch.arange(N) < torch.tensor([[N], [5]]))
    run_several_times(slopes_changed_between, *qkv(), torch.tensor([0.5, 0.25, 0.125]))
    run_several_times(other_product_changed_in_place, *qkv(), torch.tensor([0.5, 0.25, 0.125]))


def test_inputs_that_overlap():
    cache = tensors((2, B, H, N, D))[0]

    def function(q, cache, k, v):
        weights = (q @ k.mT).softmax(-1)
        cache[0].mul_(2)  # this is the key
        return weights @ v

    q = qkv()[0]
    run_several_times(function, q, cache, cache[0], cache[1])
    report, _ = compiled(function, q, cache, cache[0], cache[1])  # the copies that the helper makes do not overlap
    assert report.missed == []


def cache_written_at_a_position(q, k, v, keys, values, position):
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    mask = torch.arange(keys.shape[2])[None] <= position[:, None]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def cache_set(q, k, v, keys, values, position):
    keys[:, :, position] = k
    values[:, :, position] = v
    position.add_(1)
    mask = torch.arange(keys.shape[2])[None] < position[:, None]
    return (q @ keys.mT).masked_fill(~mask, MIN).softmax(-1) @ values


@pytest.mark.parametrize("function", [cache_written_at_a_position, cache_set], ids=lambda function: function.__name__)
def test_a_cache_is_written_before_it_is_read(function):
    q, k, v = (x[:, :, :2] for x in qkv())
    keys, values = tensors((), ())
    run_several_times(function, q, k, v, keys, values, torch.tensor([3, 4]))


# -- custom code in between -----------------------------------------------------------------------------------------


@torch.library.custom_op("effattn_tests::double_in_place", mutates_args=("x",))
def double_in_place(x: torch.Tensor) -> None:
    x.mul_(2)


@double_in_place.register_fake
def _(x):
    return None


def test_a_custom_operator_that_writes_the_scores():
    def function(q, k, v):
        scores = q @ k.mT
        double_in_place(scores)
        return scores.softmax(-1) @ v

    report, _ = compiled(function, *qkv())
    assert "double_in_place.default writes into the scores" in report.missed[0].reason


def test_a_custom_operator_that_writes_the_key():
    def function(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        torch.ops.effattn_tests.double_in_place(k.view(-1))
        return weights @ v

    report, _ = compiled(function, *qkv())
    assert "key is written between the scores and the output" in report.missed[0].reason


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_a_function_with_its_own_gradient():
    def function(q, k, v):
        return Doubled.apply(q @ k.mT).softmax(-1) @ v

    report, _ = compiled(function, *[x.requires_grad_() for x in qkv()])
    assert report.sites == []
    assert "has no symbolic meaning" in report.missed[0].reason


def allowed(x):
    x.add_(1)
    return x.sum()


def test_a_foreign_function_may_do_anything():
    def function(q, k, v):
        scores = q @ k.mT
        torch.compiler.allow_in_graph(allowed)
        total = allowed(scores)
        return scores.softmax(-1) @ v + total

    report, _ = compiled(function, *qkv())
    assert report.sites == []


def test_checkpointing_is_found_or_left_alone_and_right():
    from torch.utils.checkpoint import checkpoint

    def attention(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    def function(q, k, v):
        return checkpoint(attention, q, k, v, use_reentrant=False)

    report, _ = compiled(function, *[x.requires_grad_() for x in qkv()], verify=False)
    (missed,) = report.missed
    assert missed.reason.startswith("it is inside tag_activation_checkpoint")
    assert "checkpointing" in missed.hint


@pytest.mark.parametrize("spelling", ["softmax", "sdpa"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "vjp"])
def test_attention_under_torch_func_does_not_keep_other_attention_from_being_found(spelling, transform):
    def attention(x):
        if spelling == "sdpa":
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return (x @ x.mT).softmax(-1) @ x

    transformed = {
        "vmap": torch.vmap(attention),
        "grad": torch.func.grad(lambda x: attention(x).sum()),
        "vjp": lambda x: torch.func.vjp(attention, x)[0],
    }[transform]
    report, _ = compiled(lambda x: transformed(x) + attention(x.sin()), qkv()[0], verify=False)
    assert len(report.sites) == 1
    assert [missed.reason for missed in report.missed] == [
        "it runs inside a transformation of torch.func (vmap, grad, jvp)"
    ]


@pytest.mark.parametrize("spelling", ["softmax", "sdpa"])
def test_autocast(spelling):
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            if spelling == "sdpa":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            scores = q @ k.mT * 0.25 + torch.full((N, N), -INF).triu(1)
            return scores.softmax(-1) @ v

    report, out = compiled(function, *qkv(), tolerance=3e-2)
    assert out.dtype == torch.bfloat16
    assert [site.predicate for site in report.sites] == ["k <= q"], report.missed


def test_a_tensor_whose_shape_changes_in_place():
    def function(q, k, v):
        q = q.clone()
        scores = q @ k.mT
        q.transpose_(2, 3)
        return (scores).softmax(-1) @ v + q.mT

    compiled(function, *qkv())


# -- gradients ------------------------------------------------------------------------------------------------------


def detached_weights(q, k, v):
    return (q @ k.mT).softmax(-1).detach() @ v


def detached_scores(q, k, v):
    return (q @ k.mT).detach().softmax(-1) @ v


def detached_key(q, k, v):
    return (q @ k.detach().mT * 0.5).softmax(-1) @ v


def weights_without_gradient(q, k, v):
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def query_without_gradient(q, k, v):
    with torch.no_grad():
        scaled = q * 0.5
    return (scaled @ k.mT).softmax(-1) @ v


def all_without_gradient(q, k, v):
    with torch.no_grad():
        out = (q @ k.mT).softmax(-1) @ v
    return out + v


def learned_bias(q, k, v):
    return (q @ k.mT + v[:, :, :, :1]).softmax(-1) @ v


def learned_scale(q, k, v):
    return (q @ k.mT * k[0, 0, 0, 0]).softmax(-1) @ v


def score_twice(q, k, v):
    scores = q @ k.mT
    return (scores + scores.detach()).softmax(-1) @ v


def soft_cap_and_causal(q, k, v):
    scores = torch.tanh(q @ k.mT / 4) * 4
    return scores.masked_fill(torch.ones(N, N).triu(1) > 0, -INF).softmax(-1) @ v


def shared_heads(q, k, v):
    return (q @ k[:, :1].expand(B, H, N, D).mT).softmax(-1) @ v[:, :1].expand(B, H, N, D)


def result_changed_in_place(q, k, v):
    """A product does not need its result for the gradient; attention does."""
    out = (q @ k.mT * 0.5).softmax(-1) @ v
    out += 1
    out.transpose(1, 2)[:, 0] = 0
    return out


def result_of_a_mask_changed_in_place(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] + 2, -INF)
    return (scores.softmax(-1) @ v).mul_(q)


GRADIENTS = [
    (result_changed_in_place, None),
    (result_of_a_mask_changed_in_place, None),
    (detached_weights, "detach stops the gradient between softmax and value"),
    (detached_scores, "detach stops the gradient between the product of query and key and softmax"),
    (detached_key, None),
    (weights_without_gradient, ""),
    (query_without_gradient, None),
    (all_without_gradient, None),
    (learned_bias, ""),
    (learned_scale, ""),
    (score_twice, ""),
    (soft_cap_and_causal, None),
    (shared_heads, None),
]


@pytest.mark.parametrize(("function", "reason"), GRADIENTS, ids=[function.__name__ for function, _ in GRADIENTS])
def test_gradients(function, reason):
    from effattn.compiler.backend import effattn

    report, _ = compiled(function, *[x.requires_grad_() for x in qkv()], verify=False)
    if reason:
        assert reason in report.missed[0].reason
    if reason is None:
        assert report.missed == []

    torch._dynamo.reset()
    fast = torch.compile(function, backend=lambda gm, given: effattn(gm, given, options={"rest": "eager"}))
    grads = []
    for run in (function, fast):
        given = [x.requires_grad_() for x in qkv()]
        out = run(*given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        grads.append([x.grad for x in given])
    for actual, expected in zip(grads[1], grads[0], strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_symbolic_heads_are_left_alone():
    """``dynamic=True`` makes heads and head_dim of a function's arguments symbolic too."""
    report, _ = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), *qkv(), dynamic=True)
    assert [missed.reason for missed in report.missed] == ["the number of heads or head_dim is a symbolic size"]
    report, _ = compiled(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *qkv(), dynamic=True)
    assert [missed.reason for missed in report.missed] == ["the number of heads or head_dim is a symbolic size"]

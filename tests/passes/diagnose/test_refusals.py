"""What must not be rewritten is left alone, with a reason that a user understands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from small import INF, MIN, B, D, H, N, qkv

from effattn.ir.refusal import Why


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
    scores[..., ::2] = -INF
    return scores.softmax(-1) @ v


def scores_changed_through_a_view(q, k, v):
    scores = q @ k.mT
    torch.atleast_2d(scores).mul_(2)
    return scores.softmax(-1) @ v


def scores_changed_by_a_function_in_place(q, k, v):
    scores = q @ k.mT
    F.elu(scores, 1.0, True)
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


def fill_scaled_by_data_in_float16(q, k, v):
    """-65504 times more than one is -inf: rows without keys are NaN in some heads, and a mean in others."""
    scores = (q.half() @ k.half().mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] - 3, -65504.0)
    return (scores * q[0, :, :1, :1].half().exp()).softmax(-1) @ v.half()


def ten_thousand_added_and_scaled_in_float16(q, k, v):
    hidden = (torch.arange(N) > torch.arange(N)[:, None] - 3).half() * -10000.0
    return ((q.half() @ k.half().mT + hidden) / 3.0).softmax(-1) @ v.half()


def ten_thousand_added_and_turned_in_bfloat16(q, k, v):
    hidden = (torch.arange(N) > torch.arange(N)[:, None]).bfloat16() * -10000.0
    return ((q.bfloat16() @ k.bfloat16().mT + hidden) * -0.3).softmax(-1) @ v.bfloat16()


def ten_thousand_added_in_bfloat16(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    seen = (torch.arange(N) < torch.tensor([[N], [0]]))[:, None, None]
    return (q @ k.mT + (1.0 - seen.to(q.dtype)) * -10000.0).softmax(-1) @ v


def fills_of_two_kinds(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.arange(N) > torch.arange(N)[:, None] - 3, -1e9)
    return scores.masked_fill(torch.arange(N) < 2, MIN).softmax(-1) @ v


LEFT_ALONE = {
    weights_returned: Why.WEIGHTS,
    weights_used_twice: Why.WEIGHTS,
    softmax_over_queries: Why.VALUE,
    softmax_over_heads: Why.AXIS,
    softmax_by_hand_over_queries: Why.VALUE,
    router: Why.NOT_ATTENTION,
    classifier: Why.NOT_ATTENTION,
    weights_masked: Why.WEIGHTS,
    weights_masked_in_place: Why.WEIGHTS,
    weights_changed_through_a_view: Why.WEIGHTS,
    weights_of_the_best: Why.CHOSEN_KEYS,
    weights_normalised_again: Why.WEIGHTS,
    scores_of_the_best: Why.CHOSEN_KEYS,
    nan_as_fill: Why.READING,
    infinity_as_fill: Why.SCORE_AND_MASK,
    nothing_allowed: Why.EMPTY_MASK,
    zero_times_infinity: Why.SCORE_AND_MASK,
    result_added: Why.OUTPUT,
    result_written_to_a_buffer: Why.OUTPUT,
    unknown_operation: Why.NO_PRODUCT,
    rounded_scores: Why.NO_PRODUCT,
    scores_as_bits: Why.NO_PRODUCT,
    scores_in_eight_bits: Why.NO_PRODUCT,
    scores_of_pieces: Why.LENGTHS,
    scores_of_pieces_of_rows: Why.LENGTHS,
    scores_set: Why.MEMORY,
    scores_changed_through_a_view: Why.MEMORY,
    scores_changed_by_a_function_in_place: Why.MEMORY,
    scores_changed_through_a_piece: Why.MEMORY,
    whole_numbers: Why.OPERANDS,
    double: Why.DTYPE,
    double_with_batch_and_heads_in_one: Why.DTYPE,
    mixed_types: Why.DTYPE,
    no_keys: Why.EMPTY,
    key_written_before_the_product_with_value: Why.MEMORY,
    query_written_before_the_product_with_value: Why.MEMORY,
    value_is_the_scores_memory: Why.MEMORY,
    fill_scaled_by_data_in_float16: Why.SCORE_AND_MASK,
    ten_thousand_added_and_scaled_in_float16: Why.ROWS_WITHOUT_KEYS,
    ten_thousand_added_and_turned_in_bfloat16: Why.ROWS_WITHOUT_KEYS,
    ten_thousand_added_in_bfloat16: Why.ROWS_WITHOUT_KEYS,
    fills_of_two_kinds: Why.ROWS_WITHOUT_KEYS,
}

# the operation that stands in the way, as the user wrote it
NAMES = {
    weights_masked: "weights are set to zero by another mask than that of the scores",
    result_written_to_a_buffer: "matmul writes its result into another tensor (out=)",
    unknown_operation: "erf stands between the product of query and key and softmax",
    rounded_scores: "round stands between",
    scores_set: "'[...] =' writes into the scores before softmax",
    scores_changed_through_a_view: "mul_ writes into the scores before softmax",
    scores_changed_by_a_function_in_place: "elu writes into the scores before softmax",
}


@pytest.mark.parametrize("function", LEFT_ALONE, ids=lambda function: function.__name__)
def test_left_alone(function):
    report, _ = compiled(function, *qkv())
    assert report.sites == [], report.sites
    (missed,) = report.missed
    assert missed.rule == LEFT_ALONE[function], missed
    assert missed.attention == (missed.rule != Why.NOT_ATTENTION)
    assert __file__ in missed.location
    if function in NAMES:
        assert NAMES[function] in missed.reason
        assert missed.cause.startswith(f"{__file__}:")

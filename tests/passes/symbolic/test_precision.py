"""A reading must not round differently from the user's code where that moves a mask or loses a score's digits.

Whole numbers beyond 2**24 in float32, float64, small integer types, and large numbers that nearly cancel.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled

B, H, N, D = 2, 3, 17, 8
HIDDEN = -torch.inf
_random = torch.Generator().manual_seed(0)
QKV = [torch.randn(B, H, N, D, generator=_random) for _ in range(3)]
SECONDS = 1.7e9 + 3 * torch.arange(N).double() + torch.rand(N, generator=_random).double()  # a day's log, say
LARGE_IDS = torch.randint(0, 3, (B, N), generator=_random) + 2**26
KEPT = (torch.rand(B, N, generator=_random) > 0.3).to(torch.uint8)
KEPT[:, 0] = 1


def scores(q, k):
    return q @ k.mT


def later_in_float64(q, k, v, seconds):
    return scores(q, k).masked_fill(seconds[:, None] < seconds[None, :], HIDDEN).softmax(-1) @ v


def later_in_whole_seconds_as_floats(q, k, v, seconds):
    return later_in_float64(q, k, v, seconds.long().float())


def later_of_promoted_numbers(q, k, v, seconds):
    return scores(q, k).masked_fill(seconds.long()[:, None] < seconds.float()[None, :], HIDDEN).softmax(-1) @ v


def same_large_id_as_floats(q, k, v, ids):
    ids = ids.float()
    return scores(q, k).masked_fill(ids[:, None, :, None] != ids[:, None, None, :], HIDDEN).softmax(-1) @ v


def decay_in_float64(q, k, v, seconds):
    return (scores(q, k) - (0.1 * (seconds[:, None] - seconds[None, :]).abs()).float()).softmax(-1) @ v


def decay_in_float32(q, k, v, seconds):
    return (scores(q, k) - 0.1 * (seconds[:, None] - seconds[None, :])).softmax(-1) @ v


def decay_without_a_factor(q, k, v, seconds):
    return (scores(q, k) + (seconds[None, :] - seconds[:, None])).softmax(-1) @ v


def decay_as_mask_of_sdpa(q, k, v, seconds):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seconds[None, :] - seconds[:, None])


def decay_of_whole_numbers(q, k, v, seconds):
    return decay_in_float32(q, k, v, seconds.long())


def decay_of_far_positions(q, k, v):
    position = torch.arange(N).float() * 0.1 + 1e6
    return (scores(q, k) - (position[:, None] - position[None, :])).softmax(-1) @ v


def bias_of_baddbmm(q, k, v, seconds):
    bias = (seconds[None, :] - seconds[:, None]).expand(B, N, N)
    return torch.baddbmm(bias, q[:, 0], k[:, 0].mT, beta=0.1, alpha=0.3).softmax(-1) @ v[:, 0]


def positions_that_wrap(q, k, v):
    position = torch.arange(N, dtype=torch.int32) * 300_000_000
    return scores(q, k).masked_fill(position[:, None] < position, HIDDEN).softmax(-1) @ v


def either_of_two_masks_by_max(q, k, v):
    i = torch.arange(N)
    kept = torch.max(i[:, None] >= i, i[:, None] < i - 3)
    return scores(q, k).masked_fill(~kept, HIDDEN).softmax(-1) @ v


def subtracted_twice(q, k, v):
    i = torch.arange(N)
    return scores(q, k).masked_fill(torch.rsub(i[:, None], i, alpha=2) > 0, -1e9).softmax(-1) @ v


def small_type_minus_one(q, k, v, kept):
    return (scores(q, k) + (kept.long() - 1)[:, None, None, :]).softmax(-1) @ v


def small_type_times_hundred(q, k, v, kept):
    return (scores(q, k) + 0.01 * (kept.long() * 1000)[:, None, None, :]).softmax(-1) @ v


CASES = [
    (later_in_float64, SECONDS),
    (later_in_whole_seconds_as_floats, SECONDS),
    (later_of_promoted_numbers, SECONDS),
    (same_large_id_as_floats, LARGE_IDS),
    (decay_in_float64, SECONDS),
    (decay_in_float32, (SECONDS - 1.699e9).float()),
    (decay_without_a_factor, (SECONDS - 1.699e9).float()),
    (decay_as_mask_of_sdpa, (SECONDS - 1.699e9).float()),
    (decay_of_whole_numbers, SECONDS),
    (decay_of_far_positions,),
    (bias_of_baddbmm, (SECONDS - 1.699e9).float()),
    (positions_that_wrap,),
    (either_of_two_masks_by_max,),
    (subtracted_twice,),
    (small_type_minus_one, KEPT),
    (small_type_times_hundred, KEPT),
]


@pytest.mark.parametrize(("function", "more"), [(f, more) for f, *more in CASES], ids=[f.__name__ for f, *_ in CASES])
def test_same_as_the_author(function, more):
    report, _ = compiled(function, *QKV, *more)
    assert report.missed == []
    assert len(report.sites) == 1


def test_a_difference_of_data_is_computed_first():
    report, _ = compiled(decay_in_float32, *QKV, SECONDS.float())
    assert report.sites[0].score == "s - 0.1*(-bias[k] + bias[q])"


def scores_in_float64(q, k, v):
    return scores(q, k).double().softmax(-1).float() @ v


def weights_in_float64(q, k, v):
    return scores(q, k).softmax(-1, dtype=torch.float64).float() @ v


@pytest.mark.parametrize("function", [scores_in_float64, weights_in_float64], ids=lambda function: function.__name__)
def test_float64_is_left_alone(function):
    report, _ = compiled(function, *QKV)
    assert [missed.reason for missed in report.missed] == [
        "the scores are computed in torch.float64, which is not supported"
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter_when_it_runs(dtype):
    def slopes(q, k, v):
        i = torch.arange(N)
        return (scores(q, k) - 0.3 * (i[:, None] - i).abs().float()).softmax(-1) @ v

    expected = slopes(*QKV)
    torch._dynamo.reset()
    fast = torch.compile(slopes, backend=_backend())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        actual = fast(*QKV)
    finally:
        torch.set_default_dtype(before)
    assert_close(actual, expected)


def _backend():
    from effattn.compiler.backend import effattn

    return lambda graph, inputs: effattn(graph, inputs, options={"rest": "eager", "strict": True})

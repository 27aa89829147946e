"""A row that may attend to nothing gives what the user's arithmetic gives, or is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from small import INF, MIN, N, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel

from effattn.ir.refusal import Why

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


def divided_by_hand(put):
    def attend(q, k, v, seen):
        e = put(q @ k.mT, seen[:, None, None]).exp()
        return e / e.sum(-1, keepdim=True) @ v

    attend.__name__ = f"divided_by_hand_{put.__name__}"
    return attend


def ten_thousand_filled(s, seen):
    return s.masked_fill(~seen, -1e4)


def ten_thousand_added(s, seen):
    return s + (1.0 - seen.to(s.dtype)) * -1e4


def hundred_added(s, seen):
    return s + torch.where(seen, 0.0, -120.0)


def billion_added_last(s, seen):
    return s + torch.where(seen, 0.0, -1e9)


def ten_thousand_scaled_by_data(s, seen):
    return s.masked_fill(~seen, -1e4) * (1 + seen.sum(-1, keepdim=True))


def billion_filled_and_negated(s, seen):
    return 2 - s.masked_fill(~seen, -1e9) / 3


def ten_added(s, seen):
    return s + torch.where(seen, 0.0, -10.0)


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


def billion_added_before_a_bias(q, k, v, seen):
    """As AlphaFold: the numbers of a row that sees nothing have no digits left, and the bias is added to what is."""
    scores = q @ k.mT * 0.3
    scores = scores + 1e9 * (seen.float() - 1)[:, None, None, :]
    scores = scores + 40 * torch.sin(torch.arange(N)[:, None] * 3.0 + torch.arange(N))
    return scores.softmax(-1) @ v


def billion_added_between_biases(q, k, v, seen):
    wave = torch.sin(torch.arange(N)[:, None] * 3.0 + torch.arange(N))
    return ((70 * wave + q @ k.mT) + torch.where(seen, 0.0, -1e9)[:, None, None, :] + 40 * wave.mT).softmax(-1) @ v


def billion_added_and_scaled(q, k, v, seen):
    scores = (q @ k.mT + torch.where(seen, 0.0, -1e9)[:, None, None, :]) * 0.3
    return (scores + 40 * torch.sin(torch.arange(N) * 3.0)).softmax(-1) @ v


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
    *[
        (divided_by_hand(put), None, EMPTY, torch.float32)  # all exponentials are 0, or some are infinite: NaN
        for put in (
            ten_thousand_filled,
            ten_thousand_added,
            hundred_added,
            billion_added_last,
            ten_thousand_scaled_by_data,
            billion_filled_and_negated,
        )
    ],
    (divided_by_hand(ten_added), "never", EMPTY, torch.float32),
    (billion_filled_and_shifted_by_hand, "mean", EMPTY, torch.float32),
    (billion_filled_and_shifted, "mean", EMPTY, torch.float32),
    (billion_added, "nan", EMPTY, torch.float32),  # a mean, as the numbers themselves give
    (billion_added_and_cast, "nan", EMPTY, torch.float32),
    (billion_added_and_cast, None, EMPTY, torch.bfloat16),
    (billion_added_in_place, "nan", EMPTY, torch.float32),
    (billion_added_twice, "nan", EMPTY, torch.float32),
    (billion_added_before_a_bias, "nan", EMPTY, torch.float32),
    (billion_added_between_biases, "nan", EMPTY, torch.float32),
    (billion_added_and_scaled, None, EMPTY, torch.float32),
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
        assert report.missed[0].rule == Why.ROWS_WITHOUT_KEYS
    else:
        assert [site.empty_rows for site in report.sites] == [rows], report.missed


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize(
    ("function", "seen"),
    [(function, seen) for function, rows, seen, dtype in ROWS if rows is not None and dtype == torch.float32],
    ids=lambda value: getattr(value, "__name__", str(value)[:14]),
)
def test_their_gradients(function, seen, target):
    """Large numbers that are added hide keys, not gradients. Where a gradient is NaN, that of the values is too."""
    torch._dynamo.reset()
    fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True, "target": target})
    found = []
    for run in (function, fast):
        given = [x.requires_grad_() for x in qkv()]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' gradient of such rows is N times too large
            out = run(*given, seen)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append(torch.autograd.grad((out.nan_to_num() * weights).sum(), given))
    (*wanted, wanted_value), (*got, got_value) = found
    assert_close(got_value, wanted_value, 1e-4)
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(torch.where(theirs.isnan(), torch.nan, ours), theirs, 1e-4)

"""A fill hides keys only if it is low when it reaches the softmax, beside all that other scores may be.

Every fill is put in by every spelling, and something is done to the scores before and after: what divides, limits or
turns it may leave weight on the keys that it stands at.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from torch.nn.attention.flex_attention import flex_attention

B, H, N, D = 2, 2, 17, 8
_random = torch.Generator().manual_seed(0)
QKV = [torch.randn(B, H, N, D, generator=_random) for _ in range(3)]
SEEN = torch.rand(B, N, generator=_random) > 0.4
SEEN[:, 0] = True
EMPTY = SEEN.clone()
EMPTY[1] = False  # nothing to see in the second sequence
INF = float("inf")


def causal() -> torch.Tensor:
    i = torch.arange(N)
    return i[:, None] >= i


PUT: dict[str, Callable] = {
    "chosen": lambda s, seen, fill: torch.where(seen, s, fill),
    "filled": lambda s, seen, fill: s.masked_fill(~seen, fill),
    "added": lambda s, seen, fill: s + torch.where(seen, 0.0, fill).to(s.dtype),
    "multiplied": lambda s, seen, fill: s + (1 - seen.to(s.dtype)) * fill,
}
AFTER: dict[str, Callable] = {
    "nothing": lambda s: s,
    "divided": lambda s: s / 3e8,
    "divided twice": lambda s: s / 1e5 / 3e3,
    "multiplied": lambda s: s * 2,
    "scaled": lambda s: s * 0.3,
    "soft cap": lambda s: 5 * torch.tanh(s / 5),
    "raised": lambda s: s.clamp(min=-3.0),
    "raised a little": lambda s: s.clamp(min=-1e9),
    "lowered": lambda s: s.clamp(max=2.0),
    "largest": lambda s: torch.maximum(s, torch.tensor(-2.0, dtype=s.dtype)),
    "negated": lambda s: -s / 1e9,
    "absolute": lambda s: s.abs() / 1e9,
    "exponential": lambda s: s.exp(),
    "masked again": lambda s: torch.where(causal(), s, -5.0),
    "divided and masked": lambda s: torch.where(causal(), s / 3e8, -2.0),
    "masked by infinity": lambda s: torch.where(causal(), s / 3e8, -INF),
}
# what reads as a mask, so that masked keys are not visited
HIDES = {"nothing", "multiplied", "scaled", "raised a little", "lowered"}


def attention(put: str, fill: float, after: Callable, before: Callable = lambda s: s, by_data: bool = True) -> Callable:
    def attend(q, k, v, padding):
        seen = padding[:, None, None, :] if by_data else causal()
        return after(PUT[put](before(q @ k.mT), seen, fill)).softmax(-1) @ v

    return attend


@pytest.mark.parametrize(("put", "after"), list(product(PUT, AFTER)))
def test_what_is_done_afterwards(put, after):
    report, _ = compiled(attention(put, -1e9, AFTER[after], by_data=False), *QKV, SEEN)
    if put == "chosen" and after in HIDES:
        assert report.sites[0].predicate == "k <= q"


@pytest.mark.parametrize(("put", "after"), list(product(("chosen", "added"), AFTER)))
def test_rows_in_which_everything_is_masked(put, after):
    if put == "added" and after in ("nothing", "multiplied", "scaled"):
        pytest.skip("scores lose their digits beside the fill, in PyTorch too; see test_rows_without_keys.py")
    compiled(attention(put, -1e9, AFTER[after]), *QKV, EMPTY)


# scores that may be as low as the fill, or so high that it does not lower them enough
BEFORE: dict[str, tuple[Callable, str]] = {
    "large": (lambda s: s * 1e9, "chosen"),
    "far below zero": (lambda s: -(3 * s).exp(), "chosen"),
    "exponential": (lambda s: (4 * s).exp(), "added"),
    "square": (lambda s: -s * s * 1e7, "chosen"),
    "large positions": (lambda s: s - 1e8 * torch.arange(N), "chosen"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_the_fill_stands_beside(name):
    before, put = BEFORE[name]
    report, _ = compiled(attention(put, -1e9, lambda s: s, before, by_data=False), *QKV, SEEN)
    assert report.missed or report.sites[0].predicate == "true"


LOW = {torch.float16: -65504.0, torch.bfloat16: -1e9}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("after", ["nothing", "divided", "scaled", "soft cap", "raised", "masked again"])
@pytest.mark.parametrize("put", PUT)
def test_half_precision(put, after, dtype):
    qkv = [tensor.to(dtype) for tensor in QKV]
    compiled(attention(put, LOW[dtype], AFTER[after], by_data=False), *qkv, SEEN, tolerance=2e-2)


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("after", ["divided", "multiplied", "soft cap", "raised", "masked again"])
def test_masks_of_sdpa(fill, after):
    def attend(q, k, v, padding):
        mask = AFTER[after](torch.where(padding, 0.0, fill)[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, 1, N, N))

    compiled(attend, *QKV, SEEN)


@pytest.mark.parametrize("after", ["divided", "multiplied", "soft cap", "raised", "negated"])
def test_mods_of_flex_attention(after):
    def attend(q, k, v, padding):
        def mod(s, b, h, i, j):
            return AFTER[after](torch.where(padding[b, j], s, -1e9))

        return flex_attention(q, k, v, score_mod=mod)

    compiled(attend, *QKV, SEEN)


@pytest.mark.parametrize("fill", [-1e9, -4e4])
def test_a_fill_that_half_precision_does_not_hold(fill):
    """It is -inf there, and stays so whatever it is divided by."""

    def attend(q, k, v, padding):
        s = (q @ k.mT).half() * 0.01
        s = (s.float() + torch.where(causal(), 0.0, fill)).half() * 2
        return (s.float() / 3e8).softmax(-1) @ v

    report, _ = compiled(attend, *QKV, SEEN)
    assert report.sites[0].predicate == "k <= q"


def test_a_fill_that_overflows_when_it_is_scaled():
    """The lowest float times two is -inf: a row of nothing else is NaN."""
    lowest = torch.finfo(torch.float32).min

    def attend(q, k, v, padding):
        return ((q @ k.mT + torch.where(padding, 0.0, lowest)[:, None, None, :]) * 2).softmax(-1) @ v

    report, out = compiled(attend, *QKV, EMPTY)
    assert out[1].isnan().all()
    assert report.sites[0].empty_rows == "nan"


MANY = torch.arange(N)[:, None] + 1.0
# the lowest float becomes infinite on the way, and would not if the products were taken in another order
ORDERS: dict[str, Callable] = {
    "data, then little": lambda s, t: s * t.exp() * 1e-4,
    "data, then little, then a bias": lambda s, t: s * t.exp() * 1e-4 + 0.5,
    "little, then data": lambda s, t: s * 1e-4 * t.exp(),
    "data of unknown sign": lambda s, t: s * t * 1e-4,
    "negative data": lambda s, t: s * -t * 1e-4,
    "data twice": lambda s, t: s * (t + 1) * (t / 4),
    "rows": lambda s, t: s * MANY / 1e3,
    "twice, then half": lambda s, t: (s + s) * 0.5,
    "twice, then little": lambda s, t: (s + s) * 0.5 * t.exp() * 1e-4,
    "beside another, then half": lambda s, t: (s + torch.where(causal(), 0.0, torch.finfo(s.dtype).min)) * 0.5,
    "in a maximum": lambda s, t: torch.maximum(s * t * 1e-4, -1e36 * MANY),
}


@pytest.mark.parametrize("padding", [SEEN, EMPTY], ids=["seen", "empty"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_becomes_infinite_on_the_way(order, padding):
    def attend(q, k, v, padding, temperature):
        s = (q @ k.mT).masked_fill(~padding[:, None, None, :], torch.finfo(q.dtype).min)
        return ORDERS[order](s, temperature).softmax(-1) @ v

    compiled(attend, *QKV, padding, torch.tensor(1.5))
    compiled(attend, *QKV, padding, torch.tensor(0.5))


def test_what_becomes_infinite_beside_other_keys_is_found():
    """Every row sees a key: the weights of the others are 0 in either order."""

    def attend(q, k, v, temperature):
        s = (q @ k.mT).masked_fill(~causal(), torch.finfo(q.dtype).min)
        return (s * temperature.exp() * 1e-4 + 0.5).softmax(-1) @ v

    report, _ = compiled(attend, *QKV, torch.tensor(0.5))
    assert len(report.sites) == 1

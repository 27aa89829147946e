"""Masks that compute in whole numbers give what PyTorch gives: each type wraps around at its own size.

What is read is computed exactly; where the user's type may not hold a number, the value stays data. Python numbers
and tensors without dimensions take the type of what they meet, and are cast to it first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled

B, H, N, D = 2, 2, 21, 8
_random = torch.Generator().manual_seed(0)
QKV = [torch.randn(B, H, N, D, generator=_random) for _ in range(3)]
FAR = 50_000_017


def _data(low: int, high: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, (B, 1, 1, N), generator=_random).to(dtype)


INT8, INT16, INT32 = (
    _data(torch.iinfo(dtype).min, torch.iinfo(dtype).max, dtype) for dtype in (torch.int8, torch.int16, torch.int32)
)
INT64, UINT8 = _data(-(2**40), 2**40, torch.int64), _data(0, 255, torch.uint8)
BEYOND = torch.tensor(2**32 + 5)  # 5 in 32 bits
LAST = torch.where(torch.arange(N) > 17, 2**63 - 1, torch.arange(N)).expand(B, 1, 1, N)


@dataclass(frozen=True)
class Case:
    """``seen(i, j, *data)`` -> bool [.., N, N]; ``predicate``: what it reads as, "" where some of it stays data."""

    seen: Callable
    predicate: str = ""
    data: tuple[torch.Tensor, ...] = ()


CASES = {
    "product in 64 bits": Case(lambda i, j: (i * FAR + j * 7) % 97 < 60, "(7*k + 50000017*q)%97 < 60"),
    "product that fits into 32 bits": Case(
        lambda i, j: (i.int() * FAR + j.int() * 7) % 97 < 60, "(7*k + 50000017*q)%97 < 60"
    ),
    "product that does not": Case(lambda i, j: (i.int() * (4 * FAR) + j.int() * 7) % 97 < 60),
    "product with the product of a cast": Case(lambda i, j: (i * (4 * FAR)).int() < (j * (4 * FAR)).int()),
    "square": Case(lambda i, j: (i * FAR) ** 2 % 7 < 4),
    "floor below zero": Case(
        lambda i, j: (j * FAR - i * FAR * 2) // 1000 % 7 < 3, "((-100000034*q + 50000017*k)//1000)%7 < 3"
    ),
    "truncated below zero": Case(lambda i, j: torch.div(j * FAR - i * FAR * 2, 1000, rounding_mode="trunc") % 7 < 3),
    "shifted": Case(lambda i, j: ((i.int() << 28) > j) | ((i * FAR >> 3) % 5 < 2)),
    "int32 data, multiplied": Case(lambda i, j, a: (a * a.mT) % 97 < 60, "", (INT32,)),
    "int32 data, subtracted": Case(lambda i, j, a: a - a.mT < 0, "", (INT32,)),
    "int32 data, one more": Case(lambda i, j, a: a + 1 > a, "", (INT32,)),
    "int32 data times int32 position": Case(lambda i, j, a: (a * j.int()) % 97 < 60, "", (INT32,)),
    "int32 data times position": Case(lambda i, j, a: (a * j) % 97 < 60, "(k*padding[b, 0, 0, k])%97 < 60", (INT32,)),
    "int64 data, multiplied": Case(
        lambda i, j, a: (a * a.mT) % 97 < 60, "(positions[b, 0, 0, k]*positions[b, 0, 0, q])%97 < 60", (INT64,)
    ),
    "int64 data, cast": Case(lambda i, j, a: a.int() % 5 < 3, "", (INT64,)),
    "the largest int64 among positions": Case(
        lambda i, j, a: (a.mT >= a) & (a.mT - a < 5),
        "positions[b, 0, 0, k] <= positions[b, 0, 0, q] & -positions[b, 0, 0, k] + positions[b, 0, 0, q] < 5",
        (LAST,),
    ),
    "distance to the largest int64": Case(lambda i, j, a: (a.mT - a).abs() < 5, "", (LAST,)),
    "the largest int64 as a limit": Case(
        lambda i, j, a: j <= a, "k <= lengths[b, 0, 0, 0]", (torch.full((B, 1, 1, 1), 2**63 - 1),)
    ),
    "the largest int32 as a limit": Case(
        lambda i, j, a: j <= a, "k <= lengths[b, 0, 0, 0]", (torch.full((B, 1, 1, 1), 2**31 - 1, dtype=torch.int32),)
    ),
    "uint8 data, subtracted": Case(lambda i, j, a: a - a.mT < 100, "", (UINT8,)),
    "uint8 data and a number below zero": Case(lambda i, j, a: a > -1, "", (UINT8,)),
    "uint8 data and a large number": Case(lambda i, j, a: a < 300, "", (UINT8,)),
    "uint8 data, clamped below zero": Case(lambda i, j, a: a.clamp(min=-5) < 251, "", (UINT8,)),
    "uint8 truth values": Case(
        lambda i, j, a: 1 - (a > 100).to(torch.uint8) > 0, "padding[b, 0, 0, k] <= 100", (UINT8,)
    ),
    "uint8 positions": Case(lambda i, j: i.to(torch.uint8) - j.to(torch.uint8) <= 4),
    "uint8 positions that wrap around": Case(lambda i, j: (i * 30).to(torch.uint8) < (j * 30).to(torch.uint8)),
    "int16 positions that wrap around": Case(lambda i, j: (i * 4000).short() < (j * 4000).short()),
    "int8 data, negated": Case(lambda i, j, a: -a > a.mT, "", (INT8,)),
    "int8 data, the least": Case(lambda i, j, a: torch.where(a > 0, a, -128).to(torch.int8).abs() < 100, "", (INT8,)),
    "int8 and uint8 data": Case(
        lambda i, j, a, b: (a + b) % 7 < 4, "(padding[b, 0, 0, k] + padding2[b, 0, 0, k])%7 < 4", (INT8, UINT8)
    ),
    "int16 and int8 data": Case(lambda i, j, a, b: (a * b) % 7 < 4, "", (INT16, INT8)),
    "a number without dimensions, added": Case(lambda i, j, a: (j.int() * 7 + a) % 7 < 4, "", (BEYOND,)),
    "a number without dimensions, compared": Case(lambda i, j, a: j.int() < a, "", (BEYOND,)),
    "a number without dimensions, the smaller": Case(lambda i, j, a: torch.minimum(j.int(), a) < 3, "", (BEYOND,)),
    "a number without dimensions, chosen": Case(lambda i, j, a: torch.where(i > j, j.int(), a) < 3, "", (BEYOND,)),
    "differences in 32 bits": Case(lambda i, j, a: torch.diff(a, prepend=a[..., :1]) > 0, "", (INT32,)),
    "sums in 32 bits": Case(
        lambda i, j: torch.full((N,), 300_000_000, dtype=torch.int32).cumsum(0, dtype=torch.int32) < j * FAR
    ),
    "float32 cannot count": Case(lambda i, j: (i * FAR).float() < (j * FAR + 1).float()),
    "float32 cannot multiply": Case(lambda i, j: i.float() * 16777217.0 == j.float() * 16777216.0),
    "float32 cannot divide": Case(lambda i, j: i * FAR / FAR == j),
    "float32 cannot compare": Case(lambda i, j: i * FAR + j > 350_000_120.5),
    "float16 cannot compare": Case(lambda i, j: (i + 2040) <= (j + 2040).half()),
}


def attention(seen: Callable) -> Callable:
    def attend(q, k, v, *data):
        mask = seen(torch.arange(N)[:, None], torch.arange(N), *data)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(B, 1, N, N))

    return attend


@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name):
    case = CASES[name]
    report, _ = compiled(attention(case.seen), *QKV, *case.data)
    (site,) = report.sites
    assert (site.predicate == case.predicate) or not case.predicate


READ = [name for name, case in CASES.items() if case.predicate]


@pytest.mark.parametrize("name", READ)
def test_as_pytorch_in_kernels(name):
    case = CASES[name]
    report, _ = compiled(attention(case.seen), *QKV, *case.data, target="triton")
    (site,) = report.sites
    assert site.predicate == case.predicate


def test_lengths_that_are_symbols():
    """A product of a position fits into 32 bits at these lengths, and not at others that the graph may serve."""

    def hashed(q, k, v):
        i, j = (torch.arange(x.shape[2], dtype=torch.int32) for x in (q, k))
        seen = (i[:, None] * FAR + j * 7) % 97 < 60
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    def window(q, k, v):
        i, j = (torch.arange(x.shape[2], dtype=torch.int32) for x in (q, k))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(i[:, None] * 4 - j * 3).abs() < 30)

    report, _ = compiled(hashed, *QKV, lengths=(2,))
    assert str(FAR) not in report.sites[0].predicate
    report, _ = compiled(window, *QKV, lengths=(2,))
    assert report.sites[0].predicate == "3*k < 30 + 4*q & 4*q < 30 + 3*k"

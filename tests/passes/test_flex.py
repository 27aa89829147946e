"""flex_attention: its mods are read, its block masks disappear."""

from __future__ import annotations

import pytest
import torch
from compiled import compiled
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

B, H, N, D = 2, 4, 40, 16
BLOCK = 16


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def attend(q, k, v, mask=None, score=None, **options):
    """flex_attention with its block mask made in the same graph."""
    blocks = None
    if mask is not None:
        blocks = create_block_mask(mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=BLOCK)
    return flex_attention(q, k, v, block_mask=blocks, score_mod=score, **options)


def only(report):
    assert report.missed == [], report.missed
    (site,) = report.sites
    assert site.found_as == "flex_attention"
    assert "flex_attention" not in report.graph()
    return site


def no_mods(q, k, v):
    return attend(q, k, v)


def causal(q, k, v):
    return attend(q, k, v, lambda b, h, i, j: i >= j)


def causal_window(q, k, v):
    return attend(q, k, v, lambda b, h, i, j: (i >= j) & (i - j < 7))


def prefix(q, k, v):
    return attend(q, k, v, lambda b, h, i, j: (j < 5) | (i >= j))


def documents(q, k, v):
    ids = torch.arange(q.shape[2]).expand(q.shape[0], -1) // 9
    return attend(q, k, v, lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]))


def alibi(q, k, v):
    slopes = 2.0 ** -torch.arange(1, H + 1)
    return attend(q, k, v, lambda b, h, i, j: i >= j, lambda s, b, h, i, j: s + slopes[h] * (j - i))


def soft_cap(q, k, v):
    return attend(q, k, v, score=lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0), scale=0.4)


def mask_in_the_score(q, k, v):
    return attend(q, k, v, score=lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")))


def rows_that_see_nothing(q, k, v):
    return attend(q, k, v, lambda b, h, i, j: j + 3 < i)


MODS = {
    no_mods: "true",
    causal: "k <= q",
    causal_window: "k <= q & q - k < 7",
    prefix: "k <= 4 | k <= q",
    documents: None,
    alibi: "k <= q",
    soft_cap: "true",
    mask_in_the_score: "k <= q",
    rows_that_see_nothing: None,
}


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.__name__)
def test_mods_are_read_and_block_masks_disappear(mod, qkv):
    report, _ = compiled(mod, *qkv)
    assert MODS[mod] in (None, only(report).predicate)
    for name in ("vmap", "argsort", "batch_dim", "setitem", "score_mod", "sum"):
        assert name not in report.graph()


@pytest.mark.parametrize("mod", [causal_window, documents], ids=lambda mod: mod.__name__)
def test_dynamic_length(mod, qkv):
    report, _ = compiled(mod, *qkv, lengths=(2,))
    assert only(report).form == "exact"
    assert "vmap" not in report.graph()

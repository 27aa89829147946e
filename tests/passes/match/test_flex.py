"""flex_attention: its mods are read, its block masks disappear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparing import assert_close
from compiled import compiled
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.ir.refusal import Why

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
    prefix: None,
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


# -- captured tensors --------------------------------------------------------------------------------------------


def test_documents_that_arrive_as_an_input(qkv):
    ids = (torch.arange(N) // 7).expand(B, N).clone()

    def call(q, k, v, ids):
        return attend(q, k, v, lambda b, h, i, j: (i >= j) & (ids[b, i] == ids[b, j]))

    report, _ = compiled(call, *qkv, ids)
    assert only(report).predicate == "k <= q & document[b, q] == document[b, k]"


def test_bias_and_window_that_arrive_as_inputs(qkv):
    bias = torch.randn(H, N, N, generator=torch.Generator().manual_seed(1))
    window = torch.tensor(6)

    def call(q, k, v, bias, window):
        return attend(q, k, v, lambda b, h, i, j: (i >= j) & (i - j < window), lambda s, b, h, i, j: s + bias[h, i, j])

    report, _ = compiled(call, *qkv, bias, window)
    site = only(report)
    assert site.predicate == "k <= q & q - k - offset < 0"
    assert "bias[h, q, k]" in site.score


@pytest.mark.parametrize("shift", [N - 1, 3], ids=["inside", "wraps"])
def test_relative_bias(shift, qkv):
    """An index that may be negative counts from the end then."""
    table = torch.randn(H, 2 * N, generator=torch.Generator().manual_seed(1))

    def call(q, k, v, table):
        return attend(q, k, v, score=lambda s, b, h, i, j: s + table[h, i - j + shift])

    report, _ = compiled(call, *qkv, table)
    index = "Where(3 + q - k < 0, 83 + q - k, 3 + q - k)" if shift == 3 else "39 + q - k"
    assert only(report).score == f"0.25*s + bias[h, {index}]"


def test_rows_of_a_batch_that_see_nothing_are_zero(qkv):
    lengths = torch.tensor([N, 0])

    def call(q, k, v, lengths):
        return attend(q, k, v, lambda b, h, i, j: j < lengths[b])

    report, out = compiled(call, *qkv, lengths)
    assert only(report).empty_rows == "zero"
    assert not out[1].any()


# -- shapes and outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_other_lengths_and_widths(groups):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, 17, D, generator=generator)
    k = torch.randn(B, H // groups, 33, D, generator=generator)
    v = torch.randn(B, H // groups, 33, 24, generator=generator)
    report, _ = compiled(lambda q, k, v: attend(q, k, v, lambda b, h, i, j: j <= i + 16, enable_gqa=True), q, k, v)
    assert only(report).predicate == "k <= 16 + q"
    assert f"heads {H}/{H // groups}" in only(report).layout


def test_lse_is_the_same(qkv):
    def call(q, k, v):
        return attend(q, k, v, lambda b, h, i, j: j + 3 < i, return_lse=True)

    report, (_, lse) = compiled(call, *qkv)
    assert only(report).form == "exact"
    assert lse[:, :, 0].eq(-torch.inf).all()


def test_scores_are_in_float32_whatever_the_query_is(qkv):
    """Dynamo traces a score_mod with the dtype of the query, but its scores never have it."""
    q, k, v = (tensor.bfloat16() for tensor in qkv)
    report, out = compiled(soft_cap, q, k, v, tolerance=1e-2)
    assert only(report).score == "3*tanh(0.13333333*s)"
    scores = 3.0 * torch.tanh(q.float() @ k.float().mT * 0.4 / 3.0)
    assert_close(out.float(), scores.softmax(-1) @ v.float(), 1e-2)


def test_gradients(qkv, monkeypatch):
    # flex_attention itself has no backward on the CPU, the op has
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    q, k, v = (tensor.requires_grad_() for tensor in qkv)

    def loss(q, k, v):
        out = attend(q, k, v, lambda b, h, i, j: i >= j, lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0))
        return (out**2).sum()

    scores = 3.0 * torch.tanh(q @ k.mT * D**-0.5 / 3.0)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    expected = torch.autograd.grad(((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v) ** 2).sum(), (q, k, v))
    torch._dynamo.reset()
    fast = torch.compile(loss, backend="effattn", options={"rest": "eager", "strict": True})
    for got, want in zip(torch.autograd.grad(fast(q, k, v), (q, k, v)), expected, strict=True):
        assert_close(got, want, 1e-4)


# -- block masks that arrive as inputs ---------------------------------------------------------------------------


def documents_mask() -> tuple[BlockMask, torch.Tensor]:
    ids = (torch.arange(N) // 9).expand(B, N).clone()

    def mask(b, h, i, j):
        return (i >= j) & (ids[b, i] == ids[b, j])

    return create_block_mask(mask, B, None, N, N, device="cpu", BLOCK_SIZE=BLOCK), ids


def test_block_mask_that_arrives_as_an_input(qkv):
    blocks, _ = documents_mask()
    report, _ = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), *qkv)
    lists = "blocks[b, 0, q//16, k//16]"
    assert only(report).predicate == f"k <= q & document[b, q] == document[b, k] & {lists}"
    assert report.graph().count("effattn.listed_blocks.default(") == 1


def by_hand(mask_mod) -> BlockMask:
    """Every row of blocks sees the first block only."""
    rows = -(-N // BLOCK)
    counts = torch.ones(1, 1, rows, dtype=torch.int32)
    indices = torch.zeros(1, 1, rows, rows, dtype=torch.int32)
    return BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(N, N))


def causal_mod(b, h, i, j):
    return i >= j


def other_lists(counts, indices, full_counts=None, full_indices=None, size: int = BLOCK) -> BlockMask:
    made = [None if part is None else torch.tensor(part, dtype=torch.int32) for part in (full_counts, full_indices)]
    return BlockMask.from_kv_blocks(
        *(torch.tensor(part, dtype=torch.int32) for part in (counts, indices)),
        *made,
        BLOCK_SIZE=size,
        mask_mod=causal_mod,
        seq_lengths=(N, N),
    )


MADE, MADE_FOR_EACH = (
    create_block_mask(causal_mod, *sizes, N, N, device="cpu", BLOCK_SIZE=BLOCK) for sizes in ((None, None), (B, H))
)
NONE = [[0] * 3] * 3
LATER = {  # what the first call brings and what a later one does, and which blocks that lists
    "the same": (MADE, MADE, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
    "fewer": (
        MADE,
        other_lists([[[1, 1, 2]]], [[[[0, 0, 0], [1, 0, 0], [2, 0, 9]]]], [[[0, 0, 0]]], [[NONE]]),
        [[1, 0, 0], [0, 1, 0], [1, 0, 1]],
    ),
    "full ones alone": (
        MADE,
        other_lists([[[0, 0, 1]]], [[[[0] * 3, [0] * 3, [2, 0, 0]]]], [[[0, 1, 1]]], [[[[0] * 3, [0] * 3, [1, 0, 0]]]]),
        [[0, 0, 0], [1, 0, 0], [0, 1, 1]],
    ),
    "for each batch": (
        MADE_FOR_EACH,
        other_lists(
            [[[1, 1, 1]] * H, [[1, 2, 3]] * H],
            [[[[0, 0, 0]] * 3] * H, [[[0, 1, 2]] * 3] * H],
            [[[0, 0, 0]] * H] * B,
            [[NONE] * H] * B,
        ),
        [[[1, 0, 0]] * 3, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
    ),
}


@pytest.mark.parametrize("target", ["portable", "triton"])
@pytest.mark.parametrize("case", LATER)
def test_lists_of_a_later_call_count(case, target, qkv):
    """With the same mask_mod, as FlexAttention's kernels have it; its code without kernels does not look at lists."""
    q, k, v = qkv
    first, later, listed = LATER[case]
    given = {"rest": "eager", "strict": True, "target": target}
    torch._dynamo.reset()
    with collect.listening() as heard:
        fast = torch.compile(
            lambda q, k, v, blocks: flex_attention(q, k, v, block_mask=blocks),
            backend=lambda gm, args: effattn(gm, args, options=given),
        )
        assert_close(fast(q, k, v, first), flex_attention(q, k, v, block_mask=first))
        seen = torch.tensor(listed).bool().repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[..., :N, :N]
        seen = seen.tril().expand(B, N, N)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        assert_close(fast(q, k, v, later), expected)
    assert only(heard.report(Options.read(given))).predicate.startswith("k <= q & blocks[")


@pytest.mark.parametrize("dynamic", [None, True])
def test_masks_of_other_documents_and_lengths(dynamic):
    given = {"rest": "eager", "strict": True}

    def call(q, k, v, blocks):
        return flex_attention(q, k, v, block_mask=blocks)

    torch._dynamo.reset()
    with collect.listening() as heard:
        fast = torch.compile(call, backend=lambda gm, args: effattn(gm, args, options=given), dynamic=dynamic)
        for batch, length, size in ((2, 40, 9), (2, 40, 5), (3, 51, 20), (4, 70, 11)):
            ids = (torch.arange(length) // size).expand(batch, length).clone()

            def mask(b, h, i, j, ids=ids):
                return (i >= j) & (ids[b, i] == ids[b, j])

            blocks = create_block_mask(mask, batch, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
            generator = torch.Generator().manual_seed(length)
            args = [torch.randn(batch, H, length, D, generator=generator) for _ in range(3)]
            assert_close(fast(*args, blocks), call(*args, blocks))
    report = heard.report(Options.read(given))
    assert report.missed == []
    assert len(report.sites) > 1 or dynamic


@pytest.mark.parametrize("policy", ["window", "power"])
def test_forms_take_masks_from_outside(policy, qkv):
    report, _ = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=MADE), *qkv, policy=policy)
    assert only(report).form == policy


def test_layers_share_the_table_of_their_lists(qkv):
    blocks, _ = documents_mask()

    def call(q, k, v):
        return flex_attention(flex_attention(q, k, v, block_mask=blocks), k, v, block_mask=blocks)

    report, _ = compiled(call, *qkv)
    assert len(report.sites) == 2
    assert report.graph().count("effattn.listed_blocks.default(") == 1


@pytest.mark.parametrize("mask_mod", [None, causal_mod], ids=["none", "causal"])
def test_block_lists_made_by_hand_are_left_alone(mask_mod, qkv):
    blocks = by_hand(mask_mod)
    report, _ = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), *qkv)
    assert report.sites == []
    assert report.missed[0].rule == Why.BLOCK_MASK
    assert "listed_blocks" not in report.graph()


def test_block_lists_made_by_hand_that_follow_the_mask_are_taken(qkv):
    blocks = by_hand(lambda b, h, i, j: j < 5)
    report, _ = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), *qkv)
    assert only(report).predicate == "k < 5 & blocks[0, 0, q//16, k//16]"


def test_block_lists_that_the_graph_computes_are_left_alone(qkv):
    def call(q, k, v):
        rows = -(-N // BLOCK)
        counts = torch.ones(1, 1, rows, dtype=torch.int32)
        indices = torch.zeros(1, 1, rows, rows, dtype=torch.int32)
        blocks = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, seq_lengths=(N, N))
        return flex_attention(q, k, v, block_mask=blocks)

    report, _ = compiled(call, *qkv)
    assert report.sites == []
    assert report.missed[0].rule == Why.BLOCK_MASK


# -- neighbours: grouped heads, other lengths, block sizes, batches ------------------------------------------------

KEYS = 57
LENGTHS = torch.tensor([30, 50])


def up_to_the_length(b, h, i, j):
    return j < LENGTHS[b]


def wider_with_each_head(b, h, i, j):
    return j <= i + 3 * h


def made(mask, *sizes, size: Any = BLOCK, rows: int = N):
    return create_block_mask(mask, *sizes, rows, KEYS, device="cpu", BLOCK_SIZE=size)


OF_BATCHES, OF_HEADS = made(up_to_the_length, B, None), made(wider_with_each_head, None, H)
NOT_SQUARE = made(causal_mod, None, None, size=(16, 32))
NEIGHBOURS = {
    "batches, from outside": lambda q, k, v: grouped(q, k, v, OF_BATCHES),
    "heads, from outside, and the LSE": lambda q, k, v: grouped(q, k, v, OF_HEADS, return_lse=True),
    "blocks that are not square, from outside": lambda q, k, v: grouped(q, k, v, NOT_SQUARE),
    "blocks that are not square": lambda q, k, v: grouped(q, k, v, made(causal_mod, None, None, size=(32, 16))),
    "one batch of keys": lambda q, k, v: grouped(q, k[:1], v[:1], made(up_to_the_length, B, None)),
    "one row": lambda q, k, v: grouped(q[:, :, :1], k, v, made(lambda b, h, i, j: j <= i + 30, None, None, rows=1)),
    "kernel options": lambda q, k, v: grouped(q, k, v, kernel_options={"BLOCK_M": 32, "PRESCALE_QK": True}),
    "autocast": lambda q, k, v: in_autocast(q, k, v),
}


def grouped(q, k, v, blocks=None, **options):
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=True, **options)


def in_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return grouped(q, k, v)


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_neighbours(case):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, D), (B, 2, KEYS, D), (B, 2, KEYS, 24))
    report, _ = compiled(NEIGHBOURS[case], *(torch.randn(shape, generator=generator) for shape in shapes))
    only(report)


def test_a_mask_for_one_batch_that_depends_on_the_batch_is_left_alone(qkv):
    report, _ = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=made_for_one_batch(q, k)), *qkv)
    assert report.sites == []
    assert report.missed[0].rule == Why.BLOCK_MASK


def made_for_one_batch(q, k):
    return create_block_mask(up_to_the_length, None, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=BLOCK)


# -- what is left alone ------------------------------------------------------------------------------------------


def error_function(q, k, v):
    return attend(q, k, v, score=lambda s, b, h, i, j: s + torch.erf(i - j))


def test_what_cannot_be_read_is_left_alone(qkv):
    report, _ = compiled(error_function, *qkv)
    assert report.sites == []
    assert report.missed[0].rule == Why.MOD
    assert "flex_attention" in report.graph()

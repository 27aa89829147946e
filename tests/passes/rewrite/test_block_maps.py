"""A mask without a formula has one block map in the graph, for all layers that share it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from torch.utils.checkpoint import checkpoint

from effattn.runtime.selection.block_list import BlockList, checked_parts

B, H, N, D = 2, 2, 50, 16


def qkv(length: int = N, grad: bool = False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, length, D, generator=generator).requires_grad_(grad) for _ in range(3)]


def documents(length: int = N, width: int = 13):
    return torch.arange(length).div(width, rounding_mode="floor").long().expand(B, -1).contiguous()


def seen(document):
    places = torch.arange(document.shape[1])
    same = document[:, None, :, None] == document[:, None, None, :]
    return same & (places[None] <= places[:, None])


def layers(q, k, v, document):
    mask = seen(document)
    for _ in range(3):
        q = q + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return q


def layers_that_make_it_anew(q, k, v, document):
    for _ in range(3):
        q = q + F.scaled_dot_product_attention(q, k, v, attn_mask=seen(document))
    return q


def other_scores(q, k, v, document):
    """What the score reads does not matter."""
    mask = seen(document)
    one = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
    scores = torch.tanh(one @ k.mT) + document.float()[:, None, None, :]
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def two_masks(q, k, v, document):
    one = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(document))
    return F.scaled_dot_product_attention(one, k, v, attn_mask=seen(document // 2))


def written_between(q, k, v, document):
    one = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(document))
    document.add_(torch.arange(document.shape[1]) > 20)
    return F.scaled_dot_product_attention(one, k, v, attn_mask=seen(document))


def of_other_sizes(q, k, v, document):
    one = F.scaled_dot_product_attention(q, k, v, attn_mask=seen(document))
    half = [x[:, :, : N // 2] for x in (one, k, v)]
    return one.mean() + F.scaled_dot_product_attention(*half, attn_mask=seen(document)[:, :, : N // 2, : N // 2])


def by_formula(q, k, v, document):
    return F.scaled_dot_product_attention(q * document[:1, :1, None, None], k, v, is_causal=True)


NUMBERS = {
    layers: 1,
    layers_that_make_it_anew: 1,
    other_scores: 1,
    two_masks: 2,
    written_between: 2,
    of_other_sizes: 2,
    by_formula: 0,
}


@pytest.mark.parametrize("function", NUMBERS, ids=lambda function: function.__name__)
def test_how_many(function):
    report, _ = compiled(function, *qkv(), documents(), target="triton", verify=False)
    assert report.graph().count("ops.effattn.block_map") == NUMBERS[function], report.graph()


def test_the_portable_target_needs_none():
    report, _ = compiled(layers, *qkv(), documents(), target="portable")
    assert "block_map" not in report.graph()


def strided(q, k, v, document):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    mask = (distance >= 0) & ((distance < 8) | (distance % 8 == 0))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def window(q, k, v, document):
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < 8))


TILES = {
    layers: "by block map",
    strided: "by block map; it cannot decide (q - k)%8 == 0, which is tested: right, and slower",
    window: "by formula",
    by_formula: "",  # SDPA's own
}


@pytest.mark.parametrize("function", TILES, ids=lambda function: function.__name__)
def test_the_report_says_how_tiles_are_found(function):
    report, _ = compiled(function, *qkv(), documents(), target="triton", verify=False)
    assert {site.tiles for site in report.sites} == {TILES[function]}
    assert ("    tiles      " + TILES[function] in str(report)) == bool(TILES[function])


def test_every_call_has_its_own_data_and_length():
    torch._dynamo.reset()
    options = {"rest": "eager", "strict": True, "target": "triton"}
    fast = torch.compile(layers, backend="effattn", dynamic=True, options=options)
    torch._dynamo.utils.counters.clear()
    for length, width in ((50, 13), (50, 7), (33, 40), (81, 20), (9, 4)):
        given = (*qkv(length), documents(length, width))
        torch.testing.assert_close(fast(*given), layers(*given), atol=2e-5, rtol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_number_of_blocks_may_become_one(dynamic, grad):
    """PyTorch asks whether symbolic sizes of an op's results are 1, and would compile again where that changes."""
    torch._dynamo.reset()
    fast = torch.compile(layers, backend="effattn", dynamic=dynamic, options={"strict": True, "target": "triton"})
    torch._dynamo.utils.counters.clear()
    for length in (20, 30, 45, 90, 10):
        given = (*qkv(length, grad), documents(length))
        torch.testing.assert_close(fast(*given), layers(*given), atol=2e-5, rtol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


def in_checkpoints(q, k, v, document):
    mask = seen(document)

    def layer(q):
        return q + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    for _ in range(2):
        q = checkpoint(layer, q, use_reentrant=False)
    return q


@pytest.mark.parametrize(("function", "number"), [(layers, 1), (in_checkpoints, 2)])
def test_gradients(function, number):
    """A checkpoint computes what it needs again."""
    torch._dynamo.reset()
    options = {"rest": "eager", "strict": True, "target": "triton"}
    fast = torch.compile(function, backend="effattn", options=options)
    found = []
    for one in (fast, function):
        inputs = qkv(grad=True)
        out = one(*inputs, documents())
        found.append([out, *torch.autograd.grad(out.sum(), inputs)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)


def test_a_map_that_is_passed_is_that_of_the_call():
    """What it is is no part of the launch key."""
    found = torch.arange(32, dtype=torch.int32)
    shifted = torch.cat([found[:1], found])[1:]
    assert checked_parts(found, (2, 1, 4, 2)) is found
    aligned = checked_parts(shifted, (2, 1, 4, 2))
    assert torch.equal(aligned, found)
    assert aligned.data_ptr() % 16 == 0
    for wrong in (found[:-1], found.long(), found[None], torch.stack([found, found], 1)[:, 0]):
        with pytest.raises(ValueError, match="a block map of"):
            checked_parts(wrong, (2, 1, 4, 2))


def test_the_op():
    from effattn.ir.attention import AttentionSpec, CaptureSpec
    from effattn.ir.expr import b, k, load, q, s
    from effattn.ir.plan import Plan, Sparsity

    rule = (k <= q) & (load("document", [b, k], integer=True) > 1)
    spec = AttentionSpec(s, rule, captures=(CaptureSpec("document", "int64", 2),))
    plan = Plan("mask", spec, Sparsity(blocks=(16, 32))).encode()
    query, key, _ = qkv(grad=True)
    torch.library.opcheck(torch.ops.effattn.block_map.default, (query, key, [documents()], [], [], plan))
    found = torch.ops.effattn.block_map(query, key, [documents()], [], [], plan)
    assert found.shape == (16 + 8 + 8,)
    assert not found.requires_grad
    listed = BlockList.of_parts(found, (B, 1, 4, 2), 16, 32)
    assert listed.kv_num_blocks.tolist() == [[[1, 1, 2, 2]]] * B
    assert torch.equal(listed.parts(), found)
    shifted = torch.cat([found[:1], found])[1:]  # neither at the beginning of its memory nor aligned
    for got, want in zip(BlockList.of_parts(shifted, (B, 1, 4, 2), 16, 32).tensors(), listed.tensors(), strict=True):
        assert torch.equal(got, want)
    empty = [x[:, :, :0] for x in (query, key)]
    assert torch.ops.effattn.block_map(*empty, [documents()], [], [], plan).shape == (0,)

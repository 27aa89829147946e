"""Where batch and heads lie: in blocks of a longer sequence, in one tensor for all, in an order of the user's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from compiled import compiled
from torch.utils._pytree import tree_leaves

from effattn.ir.refusal import Why

B, H, N, D, BLOCKS = 2, 3, 12, 8, 2


def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def blocks(x):
    return x.view(B, H, BLOCKS, N // BLOCKS, D)


def with_neighbours(x):
    """Each block's keys and those of the block before: [B, H, BLOCKS, 2 * N / BLOCKS, D]."""
    x = blocks(x)
    before = torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
    return torch.cat([before, x], 3)


def blocks_after_heads(q, k, v):
    """As Gemma's audio encoder."""
    return ((blocks(q) @ with_neighbours(k).mT).softmax(-1) @ with_neighbours(v)).flatten(2, 3)


def blocks_before_heads(q, k, v):
    """As LongT5: [B, blocks, length, H, D], and the result in the same order."""
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (blocks(q), with_neighbours(k), with_neighbours(v)))
    weights = torch.einsum("...qhd,...khd->...hqk", q, k).softmax(-1)
    return torch.einsum("...hqk,...khd->...qhd", weights, v).reshape(B, N, H, D)


def one_block(q, k, v):
    q, k, v = (x[:, :, None] for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def one_block_masked(q, k, v):
    later = torch.ones(N, N, dtype=torch.bool).triu(2)
    q, k, v = (x.transpose(1, 2)[:, None] for x in (q, k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k).masked_fill(later, -torch.inf)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def blocks_and_head_bias(q, k, v):
    bias = torch.linspace(-1, 1, H)[:, None, None, None]
    distance = torch.arange(N // BLOCKS)[:, None] - torch.arange(N // BLOCKS)
    return ((blocks(q) @ blocks(k).mT + bias * distance).softmax(-1) @ blocks(v)).flatten(2, 3)


def grouped_heads_in_blocks(q, k, v):
    k, v = (blocks(x)[:, :1].expand(B, H, -1, -1, -1) for x in (k, v))
    q = blocks(q).transpose(1, 2)
    return (q @ k.transpose(1, 2).mT).softmax(-1) @ v.transpose(1, 2)


def query_of_all_batches(q, k, v):
    """Learned queries, as Perceiver has them."""
    return (q[0] @ k.mT).softmax(-1) @ v


def query_expanded(q, k, v):
    return (q[:1].expand(B, -1, -1, -1) @ k.mT).softmax(-1) @ v


def query_of_all_heads(q, k, v):
    return (q[:, :1] @ k.mT).softmax(-1) @ v


def query_of_everything(q, k, v):
    return (q[0, 0].expand(B, H, N, D) @ k.mT).softmax(-1) @ v


def key_of_all_batches(q, k, v):
    return (q @ k[:1].mT).softmax(-1) @ v


def value_of_all_batches(q, k, v):
    return (q @ k.mT).masked_fill(torch.ones(N, N).triu(3) > 0, -torch.inf).softmax(-1) @ v[1]


def batches_folded_into_heads(q, k, v):
    """All batches share the keys of each head."""
    return torch.einsum("bhnm,hmd->bnhd", torch.einsum("bhnd,hmd->bhnm", q, k[0]).softmax(-1), v[0])


FOUND = [
    blocks_after_heads, blocks_before_heads, one_block, one_block_masked, blocks_and_head_bias,
    query_of_all_batches, query_expanded, query_of_all_heads, query_of_everything, key_of_all_batches,
    value_of_all_batches, batches_folded_into_heads,
]  # fmt: skip


@pytest.mark.parametrize("function", FOUND, ids=lambda function: function.__name__)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_found_and_right(function, grad):
    given = [x.requires_grad_(grad) for x in qkv()]
    report, out = compiled(function, *given, verify=not grad)
    assert len(report.sites) == 1, report.missed
    assert "softmax" not in report.graph()
    if grad:
        torch._dynamo.reset()
        fast = torch.compile(function, backend="effattn", options={"rest": "eager", "strict": True})
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad(function(*given), given, weight)
        for got, want in zip(torch.autograd.grad(fast(*given), given, weight), wanted, strict=True):
            assert_close(got, want, 1e-4)


@pytest.mark.parametrize("function", [query_of_all_batches, key_of_all_batches], ids=lambda function: function.__name__)
def test_a_batch_that_is_only_known_at_run_time(function):
    from effattn.compiler.backend import effattn

    torch._dynamo.reset()
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return effattn(gm, inputs, options={"rest": "eager", "strict": True})

    fast = torch.compile(function, backend=backend)
    for batch in (2, 3, 5):
        given = [x.repeat(3, 1, 1, 1)[:batch] for x in qkv()]
        for x in given:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        assert_close(fast(*given), function(*given))
    assert len(graphs) == 1
    assert "softmax" not in str(graphs[0].graph)


def half_of_the_query(q, k, v):
    """Each query row serves two heads: the query has a head for every other one."""
    return (q[:, :1].repeat_interleave(2, 1) @ k[:, :2].mT).softmax(-1) @ v[:, :2]


def keys_of_all_blocks(q, k, v):
    """Every block looks at the same keys, which have a dimension for heads but none for blocks."""
    return (blocks(q) @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]


def keys_of_all_blocks_in_front(q, k, v):
    return (blocks(q).transpose(1, 2) @ k[:, None].mT).softmax(-1) @ v[:, None]


@pytest.mark.parametrize(
    "function",
    [half_of_the_query, keys_of_all_blocks, keys_of_all_blocks_in_front, grouped_heads_in_blocks],
    ids=lambda function: function.__name__,
)
def test_found_or_not_it_is_right(function):
    report, _ = compiled(function, *qkv())
    assert len(report.sites) + len(report.missed) == 1


def test_attention_over_layers_is_left_as_it_is():
    """As Inkling 2: for every token one learned query over the states of some layers, as wide as the model."""

    def call(query, states):
        keys = states * torch.rsqrt(states.square().mean(-1, keepdim=True))
        weights = (query.view(1, -1).expand(B, N, 1, -1) @ keys.mT * 0.1).softmax(-1)
        return (weights @ states).squeeze(2)

    generator = torch.Generator().manual_seed(0)
    for width, rewritten in ((320, False), (64, True)):
        given = torch.randn(width, generator=generator), torch.randn(B, N, 4, width, generator=generator)
        report, _ = compiled(call, *given)
        (site,) = report.sites
        assert ("one query over few keys" not in site.reason) == rewritten
        assert ("softmax" not in report.graph()) == rewritten


def _rows_first():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 9, 3, 8, generator=generator).transpose(1, 2) for _ in range(3)]


def _scaled(q, k, v):
    return (q @ k.mT).softmax(-1) @ v * 2


def _added(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    return out + out.neg().float()


def _multiplied_and_viewed(q, k, v):
    return ((q @ k.mT).softmax(-1) @ v).mul(0.5).view(6, 9, 8)


def _activated_and_viewed(q, k, v):
    return F.gelu((q @ k.mT).softmax(-1) @ v).view(2, 27, 8)


def _split_and_viewed(q, k, v):
    first, second = F.silu((q @ k.mT).softmax(-1) @ v).chunk(2, dim=1)
    return first.view(2, 18, 8), second


@pytest.mark.parametrize(
    "function",
    [_scaled, _added, _multiplied_and_viewed, _activated_and_viewed, _split_and_viewed],
    ids=lambda function: function.__name__,
)
def test_memory_order_is_the_authors_also_after_arithmetic(function):
    report, out = compiled(function, *_rows_first())
    assert len(report.sites) == 1
    for one, other in zip(tree_leaves(out), tree_leaves(function(*_rows_first())), strict=True):
        assert one.stride() == other.stride()


def test_nothing_is_copied_where_nobody_can_tell():
    def function(q, k, v, weight):
        return F.linear((((q @ k.mT).softmax(-1) @ v) * 0.5 + q).transpose(1, 2).flatten(2), weight)

    report, _ = compiled(function, *_rows_first(), torch.eye(24))
    assert "contiguous" not in report.graph()


def test_a_value_of_more_heads_than_the_weights_have():
    """One map of weights for all heads of value is left alone; one for all batches is not."""

    def function(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    for lead, found in (((1, 3), True), ((), True), ((2, 1), False), ((1, 1), False)):
        report, _ = compiled(function, torch.randn(*lead, 7, 8), torch.randn(*lead, 7, 8), torch.randn(2, 3, 7, 8))
        assert bool(report.sites) == found
        assert found or report.missed[0].rule == Why.HEADS

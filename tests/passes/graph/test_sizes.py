"""One compiled function for several batches and lengths: a size that has a name is neither 1 nor the one first seen."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from comparing import assert_close
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from effattn.compiler.backend import effattn
from effattn.compiler.options import Options
from effattn.compiler.report import collect
from effattn.ir.refusal import Why
from effattn.passes.graph.view import as_sympy

H, D = 4, 8
SIZES = [(2, 20), (3, 33), (5, 47)]  # batch, length


def softmax(q, k, v, padding, document):
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1) | ~padding[:, None, None]
    return (q @ k.mT * D**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def sdpa(q, k, v, padding, document):
    place = torch.arange(q.shape[2])
    mask = (place[:, None] >= place) & padding[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_grouped(q, k, v, padding, document):
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)


def flex_plain(q, k, v, padding, document):
    return flex_attention(q, k, v)


def flex_block_mask(q, k, v, padding, document):
    def mask(b, h, i, j):
        return (i >= j) & (document[b, i] == document[b, j])

    blocks = create_block_mask(mask, q.shape[0], None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=16)
    return flex_attention(q, k, v, block_mask=blocks)


def flex_score_mod(q, k, v, padding, document):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i >= j, s + 0.1 * (j - i), -torch.inf))


def flex_grouped(q, k, v, padding, document):
    return flex_attention(q, k[:, :2], v[:, :2], score_mod=lambda s, b, h, i, j: s + 0.1 * h, enable_gqa=True)


def flex_one_batch_of_keys(q, k, v, padding, document):
    def mask(b, h, i, j):
        return i >= j

    blocks = create_block_mask(mask, q.shape[0], None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=16)
    return flex_attention(q, k[:1], v[:1], block_mask=blocks)


def linear(q, k, v, padding, document):
    decay = 0.9 ** (torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])).clamp(min=0)
    return (q @ (q * 0.5).mT * decay.tril()) @ q


PROJECTIONS = torch.nn.MultiheadAttention(D, 2, batch_first=True).eval()


def multihead(q, k, v, padding, document):
    return PROJECTIONS(q[:, 0], q[:, 0], q[:, 0], key_padding_mask=~padding, need_weights=False)[0]


ANCHORS = [
    *(softmax, sdpa, sdpa_grouped, flex_plain, flex_block_mask, flex_score_mod, flex_grouped, flex_one_batch_of_keys),
    *(linear, multihead),
]
# how sizes get names: (what torch.compile is given, whether dimensions are marked, anchors that are left alone then)
WAYS = {
    "automatic": (None, False, ()),
    "dynamic": (True, False, (softmax, sdpa, sdpa_grouped, linear, multihead)),  # heads are symbolic as well
    "marked": (None, True, ()),
}


def inputs(batch: int, length: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    padding = torch.rand(batch, length, generator=generator) > 0.3
    padding[:, 0] = True
    document = torch.arange(length).expand(batch, -1) // torch.randint(3, 9, (batch, 1), generator=generator)
    return [*(torch.randn(batch, H, length, D, generator=generator) for _ in range(3)), padding, document]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("anchor", ANCHORS, ids=lambda anchor: anchor.__name__)
def test_every_batch_and_length(anchor, way):
    dynamic, marked, left_alone = WAYS[way]
    given = {"rest": "eager", "strict": True}
    torch._dynamo.reset()
    with collect.listening() as heard, torch.no_grad():
        fast = torch.compile(anchor, backend=lambda gm, args: effattn(gm, args, options=given), dynamic=dynamic)
        for size in SIZES:
            args = inputs(*size)
            for arg in args if marked else ():
                torch._dynamo.mark_dynamic(arg, 0)
                torch._dynamo.mark_dynamic(arg, 1 if arg.dim() == 2 else 2)
            assert_close(fast(*args), anchor(*args))
    report = heard.report(Options.read(given))
    assert bool(report.sites) != (anchor in left_alone), report.missed
    assert not report.missed or anchor in left_alone, report.missed


def test_a_batch_of_unknown_size_is_left_alone():
    """Without ranges nothing tells whether value has one batch for all."""
    args = inputs(3, 20)[:3]
    for arg in args:
        torch._dynamo.decorators.mark_unbacked(arg, 0)
    torch._dynamo.reset()
    with collect.listening() as heard, torch.no_grad():
        given = {"rest": "eager", "strict": True}
        fast = torch.compile(flex_attention, backend=lambda gm, args: effattn(gm, args, options=given))
        assert_close(fast(*args), flex_attention(*args))
    report = heard.report(Options.read(given))
    assert report.sites == []
    assert report.missed[0].rule == Why.BATCH


def test_the_smallest_of_sizes_that_guards_tell_apart_is_one_of_them():
    def some_rows(x):
        if x.shape[0] > 256:
            return x
        return x + torch.arange(torch.sym_min(x.shape[0], 256)) + torch.arange(torch.sym_max(x.shape[0], 1))

    lengths = []

    def backend(gm, inputs):
        nodes = [node for node in gm.graph.nodes if isinstance(node.meta.get("example_value"), torch.Tensor)]
        read = [node for node in nodes if node.op == "placeholder" or node.target is torch.arange]
        lengths.extend(as_sympy(node.meta["example_value"].shape[0]) for node in read)
        return gm.forward

    torch._dynamo.reset()
    x = torch.zeros(90)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(some_rows, backend=backend, fullgraph=True)(x)
    assert len(lengths) == 3
    assert len(set(lengths)) == 1, lengths
    assert lengths[0].is_Symbol


def test_the_smallest_of_two_lengths_of_which_nothing_is_known_stays():
    found = []

    def backend(gm, inputs):
        (made,) = (node for node in gm.graph.nodes if node.target is torch.arange)
        found.append(as_sympy(made.meta["example_value"].shape[0]))
        return gm.forward

    torch._dynamo.reset()
    tensors = torch.zeros(9), torch.zeros(12)
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)
    torch.compile(lambda x, y: torch.arange(torch.sym_min(x.shape[0], y.shape[0])), backend=backend)(*tensors)
    assert [type(length) for length in found] == [sympy.Min]

"""Attention that is left alone is computed as the user wrote it, although Inductor has patterns of its own."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.utils.checkpoint import checkpoint

import effattn
from effattn.passes.rewrite.as_written import keep_as_written


def over_queries(q, k, v):
    return (q @ k.mT / 4).softmax(-2) @ v


def written_out(q, k, v):
    scores = q @ k.mT / 4
    weights = (scores - scores.amax(-2, keepdim=True)).exp()
    return (weights / weights.sum(-2, keepdim=True)) @ v


def with_weights(q, k, v):
    weights = (q @ k.mT / 4).softmax(-2)
    return weights @ v, weights


def made(grad=False):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 16, 16, generator=generator).requires_grad_(grad) for _ in range(3)]


def fused_by_inductor(function, backend, *given):
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        out = torch.compile(function, backend=backend)(*given)
    return out, counters["inductor"]["fuse_attention"]


@pytest.mark.parametrize("function", [over_queries, written_out])
def test_inductor_does_not_take_it_for_attention_over_keys(function):
    given = made()
    assert effattn.explain(function, *given).sites == []
    out, fused = fused_by_inductor(function, "effattn", *given)
    torch.testing.assert_close(out, function(*given), rtol=1e-5, atol=1e-5)
    assert fused == 0


def test_gradients_too():
    given, same = made(grad=True), made(grad=True)
    out, fused = fused_by_inductor(over_queries, "effattn", *given)
    out.square().sum().backward()
    over_queries(*same).square().sum().backward()
    for one, other in zip(given, same, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)
    assert fused == 0


def test_nothing_else_is_fused_less():
    given = made()
    ((out, weights), _), count = fused_by_inductor(with_weights, "effattn", *given), metrics.generated_kernel_count
    assert weights._base is None
    torch.testing.assert_close(out, with_weights(*given)[0], rtol=1e-5, atol=1e-5)
    fused_by_inductor(with_weights, "inductor", *given)
    assert count == metrics.generated_kernel_count


def test_checkpointed_parts_too():
    hidden = []

    def backend(gm, example_inputs):
        hidden.append(keep_as_written(gm))
        return gm.forward

    def part(q, k, v):
        return checkpoint(over_queries, q, k, v, use_reentrant=False) + over_queries(q, k, v)

    torch._dynamo.reset()
    given = made(grad=True)
    torch.testing.assert_close(torch.compile(part, backend=backend)(*given), part(*given))
    assert hidden == [2]

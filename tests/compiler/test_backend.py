"""The backend as a whole: what it does when one of its own passes fails, over one attention or altogether."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close

import effattn
from effattn.compiler import pipeline
from effattn.passes.canonicalize.sums_of_weights import DistributeSums
from effattn.passes.choose.choice import ChooseForms
from effattn.passes.match import anchors
from effattn.passes.match import find as match
from effattn.passes.rewrite.sites import EMITTERS


def attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def two(q, k, v):
    return attention(q, k, v), F.scaled_dot_product_attention(q, k, v, torch.ones(8, 8, dtype=torch.bool).tril())


def tensors():
    return torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))


def fails(*args, **kwargs):
    raise ZeroDivisionError("oops")


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_pass_that_fails_leaves_a_graph_that_runs(monkeypatch, rest, dynamic):
    monkeypatch.setattr(ChooseForms, "apply", fails)
    torch._dynamo.reset()
    fast = torch.compile(attention, backend="effattn", dynamic=dynamic, options={"rest": rest})
    with pytest.warns(UserWarning, match="left this graph as it was because of ZeroDivisionError: oops"):
        out = fast(*tensors())
    assert_close(out, attention(*tensors()))


def test_without_an_optional_pass_the_others_run(monkeypatch):
    monkeypatch.setattr(DistributeSums, "apply", fails)
    with pytest.warns(UserWarning, match="left distribute sums of weights as it was because of ZeroDivisionError"):
        report = effattn.explain(two, *tensors())
    assert len(report.sites) == 2
    assert [missed.attention for missed in report.missed] == [True]


@pytest.mark.parametrize("where", ["anchors", "assemble", "sdpa", "op"])
def test_a_failure_over_one_attention_leaves_that_one_alone(monkeypatch, where):
    calls = []

    def once(real):
        def fails_once(*args, **kwargs):
            calls.append(args)
            return fails() if len(calls) == 1 else real(*args, **kwargs)

        return fails_once

    if where == "anchors":
        rows = [replace(row, readings=tuple(map(once, row.readings))) for row in anchors.ANCHORS]
        monkeypatch.setattr(anchors, "ANCHORS", rows)
    elif where == "assemble":
        monkeypatch.setattr(match, "assemble", once(match.assemble))
    else:
        monkeypatch.setitem(EMITTERS, where, once(EMITTERS[where]))
    given = tensors()
    causal = torch.ones(8, 8, dtype=torch.bool).tril()

    def three(q, k, v):
        biased = (q @ k.mT + torch.arange(8)).masked_fill(~causal, -torch.inf)
        return attention(q, k, v), attention(q, k, v * 2), biased.softmax(-1) @ v, (biased * 2).softmax(-1) @ v

    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="because of ZeroDivisionError: oops"):
        report = effattn.explain(three, *given)
    assert (len(report.sites), len(report.missed)) == (3, 1)
    assert "ZeroDivisionError: oops" in report.missed[0].reason
    torch._dynamo.reset()
    calls.clear()
    fast = torch.compile(three, backend="effattn", options={"rest": "eager"})
    with pytest.warns(UserWarning, match="oops"):
        actual = fast(*given)
    assert_close(actual, three(*given))


def test_strict_raises_what_a_pass_raised(monkeypatch):
    monkeypatch.setattr(pipeline.RewriteSites, "apply", fails)
    torch._dynamo.reset()
    fast = torch.compile(attention, backend="effattn", options={"strict": True})
    with pytest.raises(Exception, match="oops"):
        fast(*tensors())


def test_strict_raises_what_was_raised_over_one_attention(monkeypatch):
    monkeypatch.setitem(EMITTERS, "sdpa", fails)
    torch._dynamo.reset()
    fast = torch.compile(two, backend="effattn", options={"strict": True})
    with pytest.raises(Exception, match="oops"):
        fast(*tensors())


def test_sizes_that_depend_on_data_are_one_attention_s_concern():
    """Of two attentions one has keys whose number is data: the other one is replaced."""

    def both(q, k, v, keep):
        index = keep.nonzero().squeeze(-1)
        return attention(q, k, v), attention(q, k[:, :, index], v[:, :, index])

    given = (*tensors(), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1]).bool())
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        report = effattn.explain(both, *given)
        assert len(report.sites) >= 1
        assert all("data" in missed.reason for missed in report.missed)
        assert not any(graph.failure for graph in report.graphs)
        torch._dynamo.reset()
        actual = torch.compile(both, backend="effattn", options={"rest": "eager"})(*given)
    assert_close(actual, both(*given))

"""The backend as a whole: what it does when one of its own passes fails."""

from __future__ import annotations

import pytest
import torch

from effattn.compiler import pipeline


def attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("rest", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_pass_that_fails_leaves_a_graph_that_runs(monkeypatch, rest, dynamic):
    def fails(*args):
        raise RuntimeError("oops")

    monkeypatch.setattr(pipeline, "rewrite", fails)
    q, k, v = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    fast = torch.compile(attention, backend="effattn", dynamic=dynamic, options={"rest": rest})
    with pytest.warns(UserWarning, match="left this graph as it was because of RuntimeError: oops"):
        out = fast(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v))


def test_strict_raises_what_a_pass_raised(monkeypatch):
    def fails(*args):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(pipeline, "rewrite", fails)
    torch._dynamo.reset()
    fast = torch.compile(attention, backend="effattn", options={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="ZeroDivisionError: oops"):
        fast(*torch.randn(3, 1, 2, 8, 16))

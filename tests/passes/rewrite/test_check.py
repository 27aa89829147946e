"""The check after the passes: a graph whose outputs are others than those of the untouched graph is refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from effattn.errors import RewriteError
from effattn.passes.rewrite.check import check


def graph(*outputs) -> fx.Graph:
    """A graph with one input and ``outputs``, made by nobody knows what."""
    made = fx.Graph()
    x = made.placeholder("x")
    x.meta["example_value"] = outputs[0]
    nodes = [made.call_function(torch.relu, (x,)) for _ in outputs]
    for node, value in zip(nodes, outputs, strict=True):
        node.meta["example_value"] = value
    made.output(tuple(nodes))
    return made


def test_outputs_stay_what_they_were():
    with FakeTensorMode():
        before = torch.empty(2, 3)
        others = {
            "torch.bfloat16": before.bfloat16(),
            r"\[2, 4\]": torch.empty(2, 4),
            r"\[2, 3, 1\]": torch.empty(2, 3, 1),
            "cuda": torch.empty(2, 3, device="cuda"),
        }
    check(graph(before, before), graph(before, before))
    for words, other in others.items():
        with pytest.raises(RewriteError, match=f"output 1 of the graph is .*{words}"):
            check(graph(before, before), graph(before, other))
    with pytest.raises(RewriteError, match="1 outputs, expected 2"):
        check(graph(before), graph(before, before))

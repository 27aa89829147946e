"""Inserting nodes: each gets the fake value and the provenance that later stages rely on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effattn.errors import RewriteError

PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


class Inserter:
    """Writes nodes at the graph's insertion point as if the author had written them where ``like`` stands.

    Whoever inserts chooses the place with ``graph.inserting_before``.
    """

    def __init__(self, graph: fx.Graph, like: fx.Node):
        self.graph, self.like, self.count = graph, like, 0
        self.mode = fake_mode(like)

    def remember(self, node: fx.Node) -> fx.Node:
        """Give a node that was just inserted its provenance and the value it has on fake tensors."""
        node.meta.update({key: self.like.meta[key] for key in PROVENANCE if key in self.like.meta})
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value"))
        with self.mode:
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.meta["example_value"] = node.target(*args, **kwargs)  # type: ignore[operator]
        self.count += 1
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.remember(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.remember(self.graph.call_method(name, args, kwargs))


def fake_mode(node: fx.Node):
    """The mode of the fake tensors that Dynamo recorded for ``node``.

    Raises:
        RewriteError: it recorded none.
    """
    for value in pytree.tree_leaves(node.meta.get("example_value")):
        mode = getattr(value, "fake_mode", None)
        if isinstance(value, torch.Tensor) and mode is not None:
            return mode
    raise RewriteError(f"{node.name} has no fake value to check the replacement against")

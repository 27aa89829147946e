"""Inserts nodes together with the fake value and provenance that later stages read."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.utils import _pytree as pytree

from effattn.errors import RewriteError
from effattn.passes.graph.autocast import autocast_at
from effattn.passes.graph.view import as_sympy

REGION = "effattn_checkpoint"  # meta key: the number of the checkpoint that a node belongs to
PROVENANCE = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", REGION)


class Inserter:
    """Inserts nodes at the graph's insertion point, with the provenance of ``like``.

    The caller sets the insertion point with ``graph.inserting_before``.
    """

    def __init__(self, graph: fx.Graph, like: fx.Node):
        self.graph, self.like = graph, like
        self.nodes: list[fx.Node] = []
        self.mode = fake_mode(like)

    def annotate(self, node: fx.Node) -> fx.Node:
        """Give a new node its provenance and its fake value."""
        self.nodes.append(node)  # first, so that undo() also erases a node whose evaluation raises
        node.meta.update({key: self.like.meta[key] for key in PROVENANCE if key in self.like.meta})
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value"))
        with autocast_at(self.like):
            node.meta["example_value"] = evaluate(self.mode, node, args, kwargs)
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.annotate(self.graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self.annotate(self.graph.call_method(name, args, kwargs))

    def undo(self) -> None:
        """Erase all inserted nodes, which nothing else may use."""
        while self.nodes:
            self.graph.erase_node(self.nodes.pop())


def evaluate(mode: Any, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The fake value of a node, computed under ``mode`` as in Dynamo.

    The Python dispatcher must be enabled: without it some functions specialise symbolic sizes to ints.
    """
    with mode, enable_python_dispatcher():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode(node: fx.Node):
    """The fake tensor mode of the value that Dynamo recorded for ``node``.

    Raises:
        RewriteError: the node has no fake tensor.
    """
    for value in pytree.tree_leaves(node.meta.get("example_value")):
        mode = getattr(value, "fake_mode", None)
        if isinstance(value, torch.Tensor) and mode is not None:
            return mode
    raise RewriteError(f"{node.name} has no fake value to check the replacement against")


def difference(before: torch.Tensor, after: torch.Tensor) -> str:
    """How a replacement's fake value differs from the original's, as text; "" if shape, dtype and device are equal."""
    shapes = [tuple(sympy.expand(as_sympy(size)) for size in value.shape) for value in (before, after)]
    if shapes[0] == shapes[1] and before.dtype == after.dtype and before.device == after.device:
        return ""
    sides = [f"{value.dtype}{list(value.shape)} on {value.device}" for value in (after, before)]
    return f"{sides[0]}, expected {sides[1]}"

"""Checks the graph after the passes: well formed, fake values for new nodes, no write lost."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effattn.errors import RewriteError
from effattn.passes.graph.insertion import difference
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.writes import writes


def check(graph: fx.Graph, original: fx.Graph) -> None:
    """Check a graph after a pass.

    Raises:
        RewriteError: a node has no fake value, inputs changed, an output's dtype, shape or device changed, or a write
        to an input is missing.
    """
    graph.lint()
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    without = {node.name for node in calls if "example_value" not in node.meta}
    if without and (inserted := without - {node.name for node in original.nodes}):
        raise RewriteError(f"{min(inserted)} was inserted without an example value")
    inputs = [[node.target for node in side.nodes if node.op == "placeholder"] for side in (original, graph)]
    if inputs[0] != inputs[1]:
        raise RewriteError("the inputs of the graph changed")
    _check_outputs(graph, original)
    if lost := _writes_to_inputs(original) - _writes_to_inputs(graph):
        raise RewriteError(f"writes to inputs disappeared: {sorted(map(str, lost))}")


def _check_outputs(graph: fx.Graph, original: fx.Graph) -> None:
    """Compare the fake values of all outputs. Symbolic sizes were compared when nodes were replaced."""
    before, after = (pytree.tree_leaves(side.output_node().args) for side in (original, graph))
    if len(before) != len(after):
        raise RewriteError(f"the graph has {len(after)} outputs, expected {len(before)}")
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        old, new = (leaf.meta.get("example_value") if isinstance(leaf, fx.Node) else leaf for leaf in (old, new))
        if isinstance(old, torch.Tensor) != isinstance(new, torch.Tensor):
            raise RewriteError(f"output {number} of the graph is a {type(new).__name__}, expected {type(old).__name__}")
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and _differ(old, new):
            raise RewriteError(f"output {number} of the graph is {difference(old, new)}")


def _differ(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.dtype != new.dtype or old.device != new.device or old.dim() != new.dim():
        return True
    sizes = zip(old.shape, new.shape, strict=True)
    return any(one != other for one, other in sizes if isinstance(one, int) and isinstance(other, int))


def _writes_to_inputs(graph: fx.Graph) -> Counter:
    writers = [node for node in graph.nodes if writes(node)]
    if not writers:
        return Counter()
    view = GraphView(graph)
    inputs = {view.memory_of(node): node.name for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    return Counter(
        (str(node.target), inputs[view.memory_of(node)]) for node in writers if view.memory_of(node) in inputs
    )

"""The graph between passes: well formed, every new node with a value, every write still there."""

from __future__ import annotations

from collections import Counter

from torch import fx

from effattn.errors import RewriteError
from effattn.passes.graph import GraphView


def check(graph: fx.Graph, original: fx.Graph) -> None:
    """Refuse a graph that a pass left in a wrong state.

    Raises:
        RewriteError: a node lacks its fake value, inputs changed, or a write to an input's memory disappeared.
    """
    graph.lint()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and "example_value" not in node.meta:
            twin = next((old for old in original.nodes if old.name == node.name), None)
            if twin is None:
                raise RewriteError(f"{node.name} was inserted without an example value")
    inputs = [[node.target for node in side.nodes if node.op == "placeholder"] for side in (original, graph)]
    if inputs[0] != inputs[1]:
        raise RewriteError("the inputs of the graph changed")
    lost = _writes_to_inputs(original) - _writes_to_inputs(graph)
    if lost:
        raise RewriteError(f"writes to inputs disappeared: {sorted(map(str, lost))}")


def _writes_to_inputs(graph: fx.Graph) -> Counter:
    view = GraphView(graph)
    inputs = {view.memory_of(node): node.name for node in graph.nodes if node.op in ("placeholder", "get_attr")}
    return Counter(
        (str(node.target), inputs[view.memory_of(node)])
        for node in graph.nodes
        if view.writes(node) and view.memory_of(node) in inputs
    )

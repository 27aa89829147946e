"""A softmax that the author wrote out: ``e = exp(x - x.amax(-1, keepdim=True)); e / e.sum(-1, keepdim=True)``.

It is the anchor of an attention like any other softmax. Without the shift, a row of which every key is masked is 0 / 0
whatever number masks; and where exp() leaves the range of its type, the author's result is not finite, and ours is.
"""

from __future__ import annotations

from torch import fx

from effattn.passes.graph import GraphView
from effattn.passes.normaliser import sum_of
from effattn.passes.vocabulary import Call


def written_softmax(view: GraphView, call: Call) -> Call | None:
    """The softmax that a division spells, as a call of the division's node; None if it spells none."""
    above, divisor = call.get("input"), call.get("other")
    if call.name != "div" or call.get("rounding_mode") is not None or view.writes(call.node):
        return None
    exponential = view.call(above)
    if exponential is None or exponential.name != "exp" or view.writes(above) or not isinstance(divisor, fx.Node):
        return None
    scores, (start, end) = exponential.get("input"), (view.time[above], view.time[call.node])
    if not isinstance(scores, fx.Node) or view.writes_between(scores, start, end):
        return None
    if view.writes_between(above, start, end):
        return None
    for dim in range(len(view.shape(above))):
        if sum_of(view, divisor, above, dim) == 0:
            return Call("softmax", call.node, {"input": scores, "dim": dim, "read_by": above})
    return None


def may_hold_written_softmax(graph: fx.Graph) -> bool:
    """A quick look for an exponential, so that other graphs cost nothing."""
    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    return any(str(getattr(node.target, "__name__", node.target)) == "exp" for node in calls)

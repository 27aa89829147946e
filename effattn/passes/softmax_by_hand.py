"""A softmax that the author wrote out: ``exp(x - max) / sum(exp(x - max))``, or ``exp(x - logsumexp(x))``.

It is the anchor of an attention like any other softmax. Without the shift by the largest, a row of which every key is
masked is 0 / 0 whatever number masks; and where exp() leaves the range of its type, the author's result is not finite,
and ours is.
"""

from __future__ import annotations

from torch import fx

from effattn.passes.graph import GraphView
from effattn.passes.normaliser import sum_of
from effattn.passes.vocabulary import Call, one_dim


def written_softmax(view: GraphView, call: Call) -> Call | None:
    """The softmax that a division or an exponential spells, as a call of its node; None if it spells none."""
    if view.writes(call.node):
        return None
    if call.name == "div":
        return _quotient(view, call)
    return _difference(view, call) if call.name == "exp" else None


def _quotient(view: GraphView, call: Call) -> Call | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)``."""
    above, divisor = call.get("input"), call.get("other")
    exponential = view.call(above)
    if exponential is None or exponential.name != "exp" or view.writes(above) or not isinstance(divisor, fx.Node):
        return None
    if call.get("rounding_mode") is not None:
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


def _difference(view: GraphView, call: Call) -> Call | None:
    """``exp(x - x.logsumexp(dim, keepdim=True))``"""
    difference = view.call(call.get("input"))
    if difference is None or difference.name != "sub" or difference.get("alpha", 1) != 1:
        return None
    scores, total = difference.get("input"), view.call(difference.get("other"))
    if total is None or total.name != "logsumexp" or total.get("input") is not scores:
        return None
    dim = one_dim(total.get("dim"), len(view.shape(scores)))
    if dim is None or total.get("keepdim", False) is not True:
        return None
    nodes = (scores, total.node, difference.node)
    start, end = view.time[total.node], view.time[call.node]
    if any(view.writes_between(node, max(start, view.time[node]), end) for node in nodes) or view.writes(total.node):
        return None
    return Call("softmax", call.node, {"input": scores, "dim": dim, "read_by": total.node, "shifted": True})


def may_hold_written_softmax(graph: fx.Graph) -> bool:
    """A quick look for an exponential, so that other graphs cost nothing."""
    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    return any(str(getattr(node.target, "__name__", node.target)) == "exp" for node in calls)

"""Softmax written by hand: ``exp(x - max) / sum(exp(x - max))``, ``exp(x - logsumexp(x))``, ``log_softmax(x).exp()``.

The division may come after the product with value. The sum may contain a sink: ``sum + exp(-max)``.

It is an anchor like any other softmax. Without subtracting the maximum, a query whose keys are all masked gives 0 / 0
whatever the fill is, and where exp() overflows the user's result is not finite while the op's is.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.assemble.admissible import SUPPORTED_DTYPES
from effattn.passes.graph.contraction import contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, one_dim
from effattn.passes.match.anchors.anchor import Start
from effattn.passes.match.anchors.softmax import SOFTMAX
from effattn.passes.match.denominator import denominator
from effattn.passes.match.products import adds_nothing


def written_softmax(view: GraphView, node: fx.Node) -> Start | None:
    """The softmax that a division or exponential computes, as a call of its node; None if it is not one."""
    call = view.call(node)
    if call is None or call.name not in ("div", "exp") or view.writes(node):
        return None
    found = _quotient(view, call) if call.name == "div" else _difference(view, call) or _of_logarithm(view, call)
    if found is None:
        return None
    tells = (node, found.get("read_by"), found.get("product"))
    return Start(found, frozenset(one for one in tells if one is not None))


def _quotient(view: GraphView, call: Call) -> Call | None:
    """``e / e.sum(dim, keepdim=True)`` with ``e = exp(x)``, or divided after the product: ``(e @ v) / e.sum(...)``."""
    above, divisor = call.get("input"), call.get("other")
    if call.get("rounding_mode") is not None or not all(isinstance(node, fx.Node) for node in (above, divisor)):
        return None
    product = contraction(view, above)
    if product is None:
        return _of_exponential(view, call, above)
    multiplied = view.call(above)
    if multiplied is not None and multiplied.name == "baddbmm" and not adds_nothing(multiplied):
        return None
    for side in ("left", "right"):
        if product.keeps_rows(side):  # the divisor has one number per row of the product
            return _divided_later(view, call, product.node, product.operand(side)[0])
    return None


def _of_exponential(view: GraphView, call: Call, above: fx.Node) -> Call | None:
    exponential, divisor, end = view.call(above), call.get("other"), view.time[call.node]
    if exponential is None or exponential.name not in ("exp", "exp2") or view.writes(above):
        return None
    rate = math.log(2) if exponential.name == "exp2" else 1  # 2 ** x is exp(x * log(2))
    scores, start = exponential.get("input"), view.time[above]
    if not isinstance(scores, fx.Node) or view.writes_between(scores, start, end):
        return None
    if view.writes_between(above, start, end):
        return None
    for dim in range(len(view.shape(above))):
        if (found := denominator(view, divisor, exponential, dim, end)) is not None:
            return Call("softmax", call.node, {"input": scores, "dim": dim, "read_by": above, "rate": rate, **found})
    return None


def _divided_later(view: GraphView, call: Call, product: fx.Node, weights: fx.Node) -> Call | None:
    """``product`` multiplies ``weights``, possibly cast, with value; nothing else may use the nodes in between."""
    chain, node = [product], weights
    while (cast := view.call(node)) is not None and (cast.name == "to" or cast.name.startswith("cast_")):
        chain.append(node)
        node = cast.get("input")
    end = view.time[call.node]
    if any(view.writes(link) or view.cuts_gradient(link, end) for link in chain):
        return None
    if any(view.held(link).dtype not in SUPPORTED_DTYPES for link in chain):
        return None
    found = _of_exponential(view, call, node)
    if found is None or found.get("dim") != len(view.shape(node)) - 1:
        return None
    if len(node.users) != 2 or any(len(link.users) != 1 for link in (*chain, call.get("other"))):
        return None
    return Call(found.name, call.node, {**found.args, "product": product, "weights": weights})


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
    if view.cuts_gradient(total.node, end):
        return None
    return Call("softmax", call.node, {"input": scores, "dim": dim, "read_by": total.node, "shifted": True})


def _of_logarithm(view: GraphView, call: Call) -> Call | None:
    """``log_softmax(x, dim).exp()``"""
    logarithm = view.call(call.get("input"))
    if logarithm is None or logarithm.name != "log_softmax" or view.cuts_gradient(logarithm.node, view.time[call.node]):
        return None
    if view.writes_between(logarithm.node, view.time[logarithm.node], view.time[call.node]):
        return None
    return Call("softmax", call.node, {**logarithm.args, "read_by": logarithm.node, "shifted": True})


def may_hold_written_softmax(graph: fx.Graph) -> bool:
    """A quick check for an exponential, so that other graphs cost nothing."""
    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    return any(str(getattr(node.target, "__name__", node.target)) in ("exp", "exp2") for node in calls)


# any quotient may look like one
MANUAL_SOFTMAX = replace(
    SOFTMAX, name="softmax, written out", start=written_softmax, unspoken=frozenset({Why.NOT_ATTENTION})
)

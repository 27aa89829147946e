"""The denominator of a softmax written by hand: the sum of its exponentials, and a sink that may be added to it.

    e = exp(x - m);  e / (e.sum(-1) + exp(-m))        # a sink with score 0, whatever m is
    e = exp(x - m);  e / (e.sum(-1) + exp(sink - m))
    e = exp(x);      e / (e.sum(-1) + 1)

(Evan Miller, "Attention Is Off By One", 2023.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.normaliser import sum_of
from effattn.passes.match.sink import before_shift
from effattn.passes.symbolic import CaptureSource


def denominator(view: GraphView, divisor: Any, exponential: Call, dim: int, end: int) -> dict[str, Any] | None:
    """Facts about the softmax ``exponential / divisor`` over ``dim``; None if it is not one.

    ``sink``: one more score per query. ``input``, ``read_by``: the scores that the sink is added to. ``nan_rows``: a
    query without keys gives NaN in spite of the sink. ``refused``: it is almost a softmax; says why it is not.
    """
    try:
        added = sum_of(view, divisor, exponential.node, dim, end)
    except Refused as refused:
        return {"refused": refused}
    if added is None:
        return _one_more(view, divisor, exponential, dim) if exponential.name == "exp" else None
    if added == 0:
        return {}
    scores, when = exponential.get("input"), view.time[exponential.node]
    if before_shift(view, scores, dim, when)[0] is scores:
        return {"sink": math.log(added)} if added > 0 else None
    if 0 < added < torch.finfo(view.held(divisor).dtype).eps / 4:
        return {}  # the sum is at least 1, so nothing changes
    reason = f"{added:g} is added to the sum of the weights, which do not sum to 1 then"
    return {
        "refused": Refused(
            Why.NORMALISER,
            reason,
            "leave it out: after the largest score is taken off the sum is at least 1",
            at=divisor,
        )
    }


def _one_more(view: GraphView, divisor: Any, exponential: Call, dim: int) -> dict[str, Any] | None:
    """``e.sum(dim, keepdim=True) + exp(-m)`` with ``e = exp(x - m)``, or with ``exp(sink - m)`` instead of
    ``exp(-m)``."""
    total, shifted = view.call(divisor), view.call(exponential.get("input"))
    if total is None or total.name != "add" or total.get("alpha", 1) != 1 or view.writes(divisor):
        return None
    if shifted is None or shifted.name != "sub" or shifted.get("alpha", 1) != 1:
        return None
    scores, shift = shifted.get("input"), shifted.get("other")
    shapes = [view.shape(node) if isinstance(node, fx.Node) else () for node in (scores, shift)]
    if len(shapes[0]) != len(shapes[1]) or shapes[1][dim] != 1 or (nan_rows := _nan_rows(view, shift, dim)) is None:
        return None
    end = view.time[divisor]
    for sum_, more in ((total.get("input"), total.get("other")), (total.get("other"), total.get("input"))):
        if sum_of(view, sum_, exponential.node, dim, end) != 0:
            continue
        column, nodes = _column(view, more, shift, shapes[0], dim)
        if column is None or any(view.cuts_gradient(node, end) for node in (divisor, shifted.node, *nodes)):
            continue
        if any(view.writes(node) or view.writes_between(node, view.time[node], end) for node in (shifted.node, *nodes)):
            continue
        if any(view.writes_between(node, view.time[node], end) for node in (scores, shift)):
            continue
        return {"input": scores, "read_by": shifted.node, "shifted": True, "sink": column, "nan_rows": nan_rows}
    return None


def _column(view: GraphView, more: Any, shift: fx.Node, shape: tuple, dim: int) -> tuple[Any, list[fx.Node]]:
    """(the sink's score, the nodes in ``more``) of ``exp(-m)`` or ``exp(sink - m)``; (None, []) for anything else."""
    exponential = view.call(more)
    if exponential is None or exponential.name != "exp":
        return None, []
    inner = view.call(exponential.get("input"))
    if inner is None:
        return None, []
    nodes = [exponential.node, inner.node]
    if inner.name == "neg" and inner.get("input") is shift:
        return 0.0, nodes
    sink = inner.get("input")
    if inner.name != "sub" or inner.get("other") is not shift or inner.get("alpha", 1) != 1:
        return None, []
    if isinstance(sink, int | float):
        return float(sink), nodes
    row = (*shape[:dim], 1, *shape[dim + 1 :])
    if (
        not isinstance(sink, fx.Node)
        or view.shape(sink) != row
        or view.writes_between(sink, view.time[sink], view.time[inner.node])
    ):
        return None, []
    return CaptureSource(sink, view.time[inner.node]), nodes


def _nan_rows(view: GraphView, shift: fx.Node, dim: int) -> bool | None:
    """Whether the shift is -inf for queries whose scores are all -inf, which makes them NaN; None if unknown."""
    call = view.call(shift)
    while call is not None and call.name in ("identity", "getitem"):
        if call.name == "getitem" and call.get("index") != 0:
            return None
        call = view.call(call.get("input"))
    if call is None:
        return None
    if call.name == "clamp" and isinstance(call.get("min"), int | float):
        return not math.isfinite(call.get("min"))
    return True if call.name in ("max", "amax") else None

"""Attention sinks, as in gpt-oss: extra columns of the softmax with a score and no value.

    weights = softmax(cat([scores, sink], -1))[..., :-1]
    weights = softmax(cat([sinks, scores], -1))[..., n:]
    weights = softmax(pad(scores, (0, 1)), -1)[..., :-1]         # a sink with score 0

Several sinks equal one whose score is their logsumexp. The remaining weights equal those of a softmax without sinks,
times ``sigmoid(lse - sink)``: ordinary attention and one factor per query. (OpenAI, gpt-oss-120b & gpt-oss-20b model
card, arXiv 2508.10925, section 2.2; Agarwal et al.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, is_dead_dropout, one_dim
from effattn.passes.symbolic import CaptureSource


class Columns(NamedTuple):
    """The number of sink columns before and after those of the keys."""

    before: Any
    after: Any


@dataclass(frozen=True)
class Scores:
    """The argument of a softmax: scores without sink columns, and the time at which they are read."""

    node: fx.Node
    time: int
    sink: CaptureSource | float | None = None
    shifted: bool = False  # user code subtracted the maximum
    columns: Columns | None = None  # sink columns beside the scores, whose weights must be dropped
    nan_rows: bool = False  # a query without keys gives NaN in spite of the sink


def scores_of(view: GraphView, softmax: Call, dim: int) -> Scores:
    """The scores before the maximum was subtracted (which changes no weight) and before a sink was added.

    Raises Refused if there are two sinks: a column, and a summand of the denominator.
    """
    found = _before_column(view, softmax, dim)
    if softmax.get("sink") is None:
        return found
    if found.sink is not None:
        raise Refused(Why.SINK, "there is a sink both in the scores and in the sum of the weights")
    return replace(found, sink=softmax.get("sink"), nan_rows=softmax.get("nan_rows", False))


def _before_column(view: GraphView, softmax: Call, dim: int) -> Scores:
    given, time = before_casts(view, softmax.get("input"), view.time[softmax.get("read_by", softmax.node)])
    node, time = before_shift(view, given, dim, time)
    shifted = node is not given or softmax.get("shifted", False)
    joined, when = before_casts(view, node, time)
    call = _unchanged(view, joined, when)
    if call is not None and call.name in ("pad", "cat"):
        columns = _dropped(view, softmax.node, dim)
        sink = None if columns is None else _sink(view, call, dim, columns)
        if sink is not None:
            return Scores(*sink, shifted=shifted, columns=columns)
    return Scores(node, time, shifted=shifted)


def _sink(view: GraphView, call: Call, dim: int, columns: Columns) -> tuple[fx.Node, int, CaptureSource | float] | None:
    """(scores, time, sink) of a call that adds ``columns`` of sinks to scores; None for other calls."""
    rank, time, many = len(view.shape(call.node)), view.time[call.node], max(columns)
    if call.name == "pad":
        value, sizes = call.get("value", 0) or 0, call.get("pad")
        constant = call.get("mode", "constant") == "constant" and isinstance(value, int | float)
        if dim != rank - 1 or not constant or not math.isfinite(value) or tuple(sizes) != tuple(columns):
            return None
        return call.get("input"), time, float(value) + math.log(many)
    parts = call.get("tensors")
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or one_dim(call.get("dim", 0), rank) != dim:
        return None
    sinks, scores = parts if columns.before else reversed(parts)
    return (scores, time, CaptureSource(sinks, time)) if view.shape(sinks)[dim] == many else None


def _dropped(view: GraphView, node: fx.Node, dim: int) -> Columns | None:
    """The columns that the first slice of the weights drops, if they are all on one side."""
    while len(node.users) == 1:
        (user,) = node.users
        call = view.call(user)
        if call is None or call.get("input") is not node:
            return None
        if (found := dropped_columns(view, call, dim)) is not None:
            return found if found.before == 0 or found.after == 0 else None
        if not call.casts and call.name != "identity" and not is_dead_dropout(call):
            return None
        node = user
    return None


def dropped_columns(view: GraphView, call: Call, dim: int) -> Columns | None:
    """The columns that a slice of weights drops: ``weights[..., :-1]``, ``weights[..., n:]``; None for other calls."""
    source = call.get("input")
    if call.name not in ("getitem", "narrow") or view.tensor(source) is None or view.tensor(call.node) is None:
        return None
    sizes, kept, first = view.shape(source), view.shape(call.node), call.get("start", 0)
    if call.name == "getitem":
        index = call.get("index")
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(entry, fx.Node) for entry in index) or dim != len(sizes) - 1:
            return None
        *others, last = index
        whole = all(entry is Ellipsis or entry == slice(None) for entry in others)
        if not whole or not (len(index) == len(sizes) or Ellipsis in others) or not isinstance(last, slice):
            return None
        if last.step not in (None, 1):
            return None
        first = last.start or 0
    elif one_dim(call.get("dim"), len(sizes)) != dim:
        return None
    if not isinstance(first, int) or first < 0:
        return None
    after = sympy.expand(sizes[dim] - first - kept[dim])
    return Columns(first, int(after)) if after.is_Integer and (first or after) else None


def require_plain(index: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
    """Raises Refused if scores with a sink are not laid out as [B, H, Nq, Nk]."""
    if index != plain:
        raise Refused(Why.SINK, "scores with a sink column are not [batch, heads, queries, keys]")


def before_shift(view: GraphView, node: fx.Node, dim: int, time: int) -> tuple[fx.Node, int]:
    """(x, time at which it is read) of ``x - x.max(dim, keepdim=True).values``; the node itself for anything else."""
    call = _unchanged(view, node, time)
    if call is None or call.name != "sub" or call.get("alpha", 1) != 1:
        return node, time
    source, largest = call.get("input"), call.get("other")
    if not isinstance(source, fx.Node) or not isinstance(largest, fx.Node):
        return node, time
    values = _unchanged(view, largest, view.time[node])
    if values is not None and values.name == "identity":  # detach(), which is allowed: weights do not depend on it
        largest = values.get("input")
        values = _unchanged(view, largest, view.time[values.node])
    if values is not None and values.name == "getitem" and values.get("index") == 0:
        values = _unchanged(view, values.get("input"), view.time[largest])
    over = values.get("dim", values.get("other")) if values is not None else None
    if values is None or values.name not in ("max", "amax") or values.get("input") is not source:
        return node, time
    same = one_dim(over, len(view.shape(source))) == dim and values.get("keepdim") is True
    if not same or view.writes_between(source, view.time[values.node], view.time[node]):
        return node, time
    return source, view.time[node]


def before_casts(view: GraphView, node: fx.Node, time: int) -> tuple[fx.Node, int]:
    """The tensor before casts to wider dtypes, and the time at which it is read."""
    while (call := _unchanged(view, node, time)) is not None:
        source = call.get("input")
        casts = call.casts or call.name == "identity"
        if not casts or view.tensor(source) is None:
            break
        before, after = view.held(source).dtype, view.held(node).dtype
        wider = before in (torch.float16, torch.bfloat16) and after in (torch.float32, torch.float64)
        if not (wider or before == after) or view.cuts_gradient(node, time):
            break
        node, time = source, view.time[node]
    return node, time


def _unchanged(view: GraphView, node: Any, time: int) -> Call | None:
    """The call of ``node``, if the node has not been written by ``time``."""
    if not isinstance(node, fx.Node) or view.writes(node) or view.writes_between(node, view.time[node], time):
        return None
    return view.call(node)

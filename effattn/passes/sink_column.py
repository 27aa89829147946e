"""Attention sinks as gpt-oss has them: one more column of the softmax, with a score of its own and no value.

    weights = softmax(cat([scores, sink], -1))[..., :-1]
    weights = softmax(pad(scores, (0, 1)), -1)[..., :-1]         # one more in the denominator: a sink of score 0

The other weights are those of a softmax without the column, times ``sigmoid(lse - sink)`` with the logarithm of the sum
of their exponentials: attention as ever, and one factor for each row. (OpenAI, gpt-oss-120b & gpt-oss-20b model card,
arXiv 2508.10925, section 2.2; Agarwal et al.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.draft import Refused
from effattn.passes.graph import GraphView
from effattn.passes.reading import LoadSource
from effattn.passes.vocabulary import Call, one_dim


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of: the scores without the sink's column, and when they are read."""

    node: fx.Node
    time: int
    sink: LoadSource | float | None = None
    shifted: bool = False  # the largest was taken off by the author
    column: bool = False  # the sink stands beside the scores, so that its weight has to be dropped
    nan_rows: bool = False  # a row without keys is NaN in spite of the sink


def scores_of(view: GraphView, softmax: Call, dim: int) -> Scores:
    """The scores before the largest was taken off (which changes no weight) and before a sink joined them.

    Raises: Refused: a sink joined them twice, as a column and in the sum that divides.
    """
    found = _before_column(view, softmax, dim)
    if softmax.get("sink") is None:
        return found
    if found.sink is not None:
        raise Refused(Why.SINK, "a sink joins the scores, and another one the sum of the weights")
    return replace(found, sink=softmax.get("sink"), nan_rows=softmax.get("nan_rows", False))


def _before_column(view: GraphView, softmax: Call, dim: int) -> Scores:
    given, time = before_casts(view, softmax.get("input"), view.time[softmax.get("read_by", softmax.node)])
    node, time = before_shift(view, given, dim, time)
    shifted = node is not given or softmax.get("shifted", False)
    joined, when = before_casts(view, node, time)
    call = _unchanged(view, joined, when)
    rank = len(view.shape(joined))
    if call is not None and call.name == "pad" and dim == rank - 1 and call.get("pad") in ((0, 1), [0, 1]):
        value = call.get("value", 0) or 0
        if call.get("mode", "constant") == "constant" and isinstance(value, int | float) and math.isfinite(value):
            return Scores(call.get("input"), view.time[joined], float(value), shifted, column=True)
    if call is None or call.name != "cat":
        return Scores(node, time, shifted=shifted)
    parts = call.get("tensors")
    both = isinstance(parts, (list, tuple)) and len(parts) == 2
    if not both or call.get("dim", 0) % rank != dim or view.shape(parts[1])[dim] != 1:
        return Scores(node, time, shifted=shifted)
    return Scores(parts[0], view.time[joined], LoadSource(parts[1], view.time[joined]), shifted, column=True)


def drops_the_sink(call: Call, dim: int, rank: int) -> bool:
    """Whether a call takes all but the last of the weights: ``weights[..., :-1]``."""
    index = call.get("index")
    if call.name != "getitem" or not isinstance(index, tuple) or dim != rank - 1 or not index:
        return False
    *before, last = index
    whole = all(entry is Ellipsis or entry == slice(None) for entry in before)
    return whole and (len(index) == rank or Ellipsis in before) and last == slice(None, -1)


def require_plain(index: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
    """Raises: Refused: the scores with a sink are laid out in another way than [B, H, Nq, Nk]."""
    if index != plain:
        raise Refused(Why.SINK, "scores with a sink column are not [batch, heads, queries, keys]")


def before_shift(view: GraphView, node: fx.Node, dim: int, time: int) -> tuple[fx.Node, int]:
    """``x`` of ``x - x.max(dim, keepdim=True).values``, and when it is read."""
    call = _unchanged(view, node, time)
    if call is None or call.name != "sub" or call.get("alpha", 1) != 1:
        return node, time
    source, largest = call.get("input"), call.get("other")
    if not isinstance(source, fx.Node) or not isinstance(largest, fx.Node):
        return node, time
    values = _unchanged(view, largest, view.time[node])
    if values is not None and values.name == "identity":  # detached: the weights do not depend on it
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
    """What was cast to a type that holds all its values, and when it is read."""
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
    """The call that made ``node``, if the node still holds what it made at ``time``."""
    if not isinstance(node, fx.Node) or view.writes(node) or view.writes_between(node, view.time[node], time):
        return None
    return view.call(node)

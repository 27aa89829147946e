"""The normaliser of linear attention: weights, or their product with value, divided by the sum of the weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.contraction import Contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import is_dead_dropout, one_dim


def divided(view: GraphView, weights: fx.Node, dim: int, time: int) -> tuple[fx.Node, float | None, int]:
    """(weights before the division, eps, time at which they are read) of ``w / (w.sum(dim) + eps)``.

    The node itself, None and ``time`` if it is not divided by its sum.

    Raises:
        Refused: the sum is clamped instead.
    """
    node = weights
    while (call := view.call(node)) is not None:
        if call.casts or call.name == "identity" or is_dead_dropout(call):
            node = call.get("input")
            if not isinstance(node, fx.Node) or view.tensor(node) is None:
                break
            continue
        if call.name == "div" and isinstance(call.get("input"), fx.Node):
            above = call.get("input")
            eps = sum_of(view, call.get("other"), above, dim, view.time[node])
            if eps is not None:
                return above, eps, view.time[node]
        break
    return weights, None, time


def divided_later(view: GraphView, product: Contraction, side: str) -> tuple[fx.Node, float] | None:
    """(the quotient, eps) if the only user of the product is ``(w @ v) / (w.sum(-1) + eps)``."""
    weights, labels = product.operand(side)
    if not product.keeps_rows(side) or len(product.node.users) != 1:
        return None
    (user,) = product.node.users
    call = view.call(user)
    if call is None or call.name != "div" or call.get("input") is not product.node or view.writes(user):
        return None
    eps = sum_of(view, call.get("other"), weights, len(labels) - 1, view.time[user])
    return None if eps is None else (user, eps)


def sum_of(view: GraphView, divisor: Any, weights: fx.Node, dim: int, time: int) -> float | None:
    """eps if ``divisor``, read at ``time``, is the sum of ``weights`` over ``dim`` (kept) plus eps.

    None otherwise, or if the gradient is stopped in between.
    """
    eps = 0.0
    rank = len(view.shape(weights))
    kept = False
    while isinstance(divisor, fx.Node) and (call := view.call(divisor)) is not None:
        if view.writes(divisor) or view.cuts_gradient(divisor, time):
            return None
        source = call.get("input")
        if call.name == "add" and not kept and call.get("alpha", 1) == 1:
            left, right = source, call.get("other")
            tensor, number = (left, right) if isinstance(left, fx.Node) else (right, left)
            if not isinstance(number, (int, float)) or isinstance(number, bool):
                return None
            divisor, eps = tensor, eps + float(number)
        elif call.casts or call.name == "identity":
            divisor = source
        elif call.name in ("reshape", "getitem") and _appends_one(view, call, rank, dim):
            divisor, kept = source, True
        elif call.name in ("clamp", "maximum") and _is_sum(view, source, weights, dim, rank):
            raise Refused(Why.NORMALISER, "the sum of the weights is clamped from below", at=divisor)
        else:
            keepdim = call.get("keepdim", False) is True
            return eps if keepdim != kept and _is_sum(view, divisor, weights, dim, rank) else None
    return None


def _appends_one(view: GraphView, call: Any, rank: int, dim: int) -> bool:
    """``x.unsqueeze(-1)`` or ``x[..., None]`` after a sum that dropped the last dimension."""
    source = call.get("input")
    if not isinstance(source, fx.Node) or dim != rank - 1 or view.tensor(source) is None:
        return False
    before, after = view.shape(source), view.shape(call.node)
    return len(before) == rank - 1 and after == (*before, 1)


def _is_sum(view: GraphView, node: Any, weights: fx.Node, dim: int, rank: int) -> bool:
    call = view.call(node) if isinstance(node, fx.Node) else None
    if call is None or call.name != "sum" or call.get("input") is not weights:
        return False
    return one_dim(call.get("dim"), rank) == dim

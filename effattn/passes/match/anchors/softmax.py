"""From a softmax to a draft: scores are read down to the product of query and key, weights followed to value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir.expr import b, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import heads_beside_batch
from effattn.passes.candidate.record import FOUND_AS, Draft, Refused
from effattn.passes.diagnose.reason import require_free_of_scores
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.products import (
    batch_index,
    depths_of,
    folded_alike,
    head_dim_of,
    note_folding,
    operand_index,
    query_and_key,
    query_key_product,
    reader_for,
    scores_at,
    sides,
    value_of,
)
from effattn.passes.match.sink import Columns, Scores, require_plain, scores_of
from effattn.passes.match.weights import Weighted, follow_weights
from effattn.passes.symbolic import CaptureSource, Reader
from effattn.passes.symbolic.pointwise import distribute


def with_heads_apart(view: GraphView, call: Call, readers: dict[tuple, Reader]) -> Draft:
    """A softmax over scores [B * H, Nq, Nk], batch and heads told apart by what query or key were before.

    Raises: Refused: also where the scores have another shape, or nothing tells them apart.
    """
    return from_softmax(view, call, readers, apart=True)


def from_softmax(
    view: GraphView, call: Call, readers: dict[tuple, Reader], apart: bool = False, mask_is_data: bool = False
) -> Draft:
    """``apart``: batch and heads are one dimension. ``mask_is_data``: what is added last is not looked into."""
    scores = call.get("input")
    if not isinstance(scores, fx.Node) or view.tensor(scores) is None or not isinstance(call.get("dim"), int):
        raise Refused(Why.ARGUMENTS, "softmax without a constant dim over a tensor")
    shape, time = view.shape(scores), view.time[call.node]
    dim = call.get("dim") % len(shape)
    found = scores_of(view, call, dim)
    scores, shape, time = found.node, view.shape(found.node), found.time
    if apart and len(shape) != 3:
        raise Refused(Why.NOT_APART, "batch and heads are not one dimension")
    product, q_dim, alone = query_key_product(view, readers, scores, shape, dim, time)
    if call.get("refused") is not None:
        raise call.get("refused")
    rest = [n for n in range(len(shape)) if n not in (dim, q_dim)]
    if apart:
        heads = _heads_beside_batch(view, readers, found, (dim, q_dim), product)
        batch = sympy.cancel(shape[rest[0]] / heads)
        leading = (h if batch == 1 else b * heads + h,)
    else:
        leading, batch, heads = batch_index([shape[n] for n in rest], [n in alone for n in rest])
    index: list[Any] = [None] * len(shape)
    for n, entry in zip(rest, leading, strict=True):
        index[n] = entry
    index[q_dim], index[dim] = q, k
    q_len, k_len = shape[q_dim], shape[dim]
    reader = reader_for(view, readers, True, batch, heads, q_len, k_len)
    term, inside = scores_at(view, reader, scores, tuple(index), time, product, mask_is_data)
    term = distribute(lambda score: score * call.get("rate", 1), term)

    require_free_of_scores(view, term, reader.captures, product.node)
    roles = sides(product, inside)
    if roles is None:
        raise Refused(Why.PRODUCT, "query and key cannot be told apart in the product before softmax", at=product.node)
    if found.sink is not None:
        require_plain(tuple(index), (b, h, q, k))
    nan_when_empty = view.call(call.node) != call and not found.shifted and found.sink is None
    if nan_when_empty and mask_is_data:
        raise Refused(Why.ROWS_WITHOUT_KEYS, "rows of nothing but large numbers would not be NaN, as they are by hand")
    end = _to_value(view, call, tuple(index), reader, found.columns)
    replaced, placed = end.replaced, (end.weights, end.index)
    head_dim, dtype = head_dim_of(view, product), view.held(replaced).dtype

    def read(whole: bool) -> tuple[Any, ...]:
        sizes = (batch, heads, q_len, k_len)
        operands = query_and_key(view, product, roles, inside, sizes, dtype, whole)
        return *operands, *value_of(view, end.product, placed, (batch, heads, k_len), whole)

    *operands, out_index, value_dim = folded_alike(view, read)
    operands[2] = replace(operands[2], factor=operands[2].factor * end.factor)
    term = term.subs(s, operands[0].factor * operands[1].factor * s)
    notes: list[str] = []
    note_folding(operands, notes)
    autocast = view.held(product.node).dtype == view.held(replaced).dtype != view.held(product.left).dtype
    if autocast:
        notes.append("autocast")
    if found.sink is not None:
        notes.append("a sink takes part in the softmax: the result is multiplied by sigmoid(lse - sink)")
    return Draft(
        anchor=call.get("read_by") if call.get("product") is not None else call.node,
        replaced=replaced,
        found_as=call.node.meta.get(FOUND_AS, "softmax"),
        query=operands[0],
        key=operands[1],
        value=operands[2],
        batch=batch,
        heads=heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=value_dim,
        term=term,
        scores_index=tuple(index),
        out_index=out_index,
        reader=reader,
        zero_when_empty=call.node.target is torch._safe_softmax or (found.sink is not None and not found.nan_rows),
        nan_when_empty=nan_when_empty,
        scores=CaptureSource(found.node, found.time),
        sink=found.sink,
        zeroed=end.zeroed,
        nan_is_zero=end.nan_is_zero,
        autocast=autocast,
        notes=notes,
    )


def _to_value(view: GraphView, call: Call, index: tuple, reader: Reader, columns: Columns | None) -> Weighted:
    """As :func:`follow_weights`; where the sum divides the product, the quotient is what is replaced."""
    if call.get("product") is None or (product := contraction(view, call.get("product"))) is None:
        return follow_weights(view, call.node, index, reader, columns)
    if columns is not None:
        raise Refused(Why.SINK, "the product with value is divided by a sum that holds a sink")
    return Weighted(call.node, product, call.get("weights"), index)


def _heads_beside_batch(
    view: GraphView, readers: dict, found: Scores, dims: tuple[int, int], product: Contraction
) -> Any:
    """How many heads the one leading dimension of the scores holds.

    Raises: Refused: no view of query or key tells.
    """
    shape, (dim, q_dim) = view.shape(found.node), dims
    (leading,) = (n for n in range(3) if n not in dims)
    index = [b, b, b]
    index[q_dim], index[dim] = q, k
    size, q_len, k_len = shape[leading], shape[q_dim], shape[dim]
    reader = reader_for(view, readers, True, size, sympy.Integer(1), q_len, k_len)
    _, inside = scores_at(view, reader, found.node, tuple(index), found.time, product)
    at = dict(zip(product.out_labels, inside, strict=True))
    bounds = Reader(view, {b: size, h: sympy.Integer(1), q: q_len, k: k_len})
    for side in ("left", "right"):
        node, labels = product.operand(side)
        entries = operand_index(view, node, labels, {**at, **depths_of(view, product)}, {})
        heads = heads_beside_batch(view, bounds, node, entries, view.held(node).dtype)
        if heads is not None and sympy.cancel(size / heads).is_integer:
            return sympy.Integer(heads)
    raise Refused(Why.NOT_APART, "nothing tells batch and heads apart")

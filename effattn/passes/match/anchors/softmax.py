"""From a softmax to a candidate: reads scores down to the product of query and key, and follows weights to value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
from torch import fx

from effattn.ir.expr import b, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import heads_beside_batch
from effattn.passes.candidate.record import FOUND_AS, Candidate, MatchedNodes, Refused
from effattn.passes.candidate.space import Leading, Readers, score_space
from effattn.passes.diagnose.reason import require_free_of_scores, truer
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.anchors.anchor import Anchor, called
from effattn.passes.match.products import query_key_product, scores_at
from effattn.passes.match.roles import (
    depths_of,
    folded_alike,
    notes_of_folding,
    operand_index,
    query_and_key,
    sides,
    value_of,
)
from effattn.passes.match.sink import Columns, Scores, require_plain, scores_of
from effattn.passes.match.weights import Weighted, follow_weights
from effattn.passes.symbolic import CaptureSource, Reader
from effattn.passes.symbolic.pointwise import distribute


def with_heads_apart(view: GraphView, call: Call, readers: Readers) -> Candidate:
    """A softmax of scores [B * H, Nq, Nk], with batch and heads told apart by earlier views of query or key.

    Raises:
        Refused: also if the scores have another shape, or no view tells batch and heads apart.
    """
    return from_softmax(view, call, readers, apart=True)


def with_mask_as_data(view: GraphView, call: Call, readers: Readers) -> Candidate:
    """A softmax whose scores have a last summand (a mask or bias) that is captured as a tensor instead of being read.

    Raises:
        Refused: also if nothing is added to the scores.
    """
    return from_softmax(view, call, readers, mask_is_data=True)


def from_softmax(
    view: GraphView, call: Call, readers: Readers, apart: bool = False, mask_is_data: bool = False
) -> Candidate:
    """``apart``: batch and heads are one dimension. ``mask_is_data``: capture the last summand of the scores."""
    scores = call.get("input")
    if not isinstance(scores, fx.Node) or view.tensor(scores) is None or not isinstance(call.get("dim"), int):
        raise Refused(Why.ARGUMENTS, "softmax without a constant dim over a tensor")
    dim = call.get("dim") % len(view.shape(scores))
    found = scores_of(view, call, dim)
    shape = view.shape(found.node)
    if apart and len(shape) != 3:
        raise Refused(Why.NOT_APART, "batch and heads are not one dimension")
    product, q_dim, alone = query_key_product(view, readers, found.node, dim, found.time)
    if call.get("refused") is not None:
        raise call.get("refused")
    leading = _heads_beside_batch(view, readers, found, (q_dim, dim), product) if apart else None
    space = score_space(view, readers, shape, (q_dim, dim), leading, alone=alone, products=True)
    reader = space.reader
    term, inside = scores_at(view, space, found.node, found.time, product, mask_is_data)
    term = distribute(lambda score: score * call.get("rate", 1), term)

    require_free_of_scores(view, term, reader.captures, product.node)
    roles = sides(product, inside)
    if roles is None:
        raise Refused(Why.PRODUCT, "query and key cannot be told apart in the product before softmax", at=product.node)
    if found.sink is not None:
        require_plain(space.index, (b, h, q, k))
    nan_when_empty = view.call(call.node) != call and not found.shifted and found.sink is None
    if nan_when_empty and mask_is_data:
        raise Refused(Why.ROWS_WITHOUT_KEYS, "queries with all keys masked would not give NaN, as they do in user code")
    end = _to_value(view, call, space.index, reader, found.columns)
    dtype = view.held(end.replaced).dtype

    def read(whole: bool) -> tuple[Any, ...]:
        operands = query_and_key(view, product, roles, inside, space, dtype, whole)
        return *operands, *value_of(view, end.product, end.weights, end.index, space, whole)

    query, key, value, out_index = folded_alike(view, read)
    value = replace(value, factor=value.factor * end.factor)
    notes = notes_of_folding((query, key, value))
    autocast = view.held(product.node).dtype == dtype != view.held(product.left).dtype
    if autocast:
        notes += ("autocast",)
    if found.sink is not None:
        notes += ("a sink takes part in the softmax: the result is multiplied by sigmoid(lse - sink)",)
    nodes = MatchedNodes(
        call.get("read_by") if call.get("product") is not None else call.node,
        end.replaced,
        query,
        key,
        value,
        scores=CaptureSource(found.node, found.time),
        sink=found.sink,
        dropout=end.dropout,
        products=(product.node, end.product.node),
    )
    return Candidate(
        nodes,
        found_as=call.node.meta.get(FOUND_AS, "softmax"),
        space=space,
        term=term.subs(s, query.factor * key.factor * s),
        out_index=out_index,
        zero_when_empty=call.get("safe", False) or (found.sink is not None and not found.nan_rows),
        nan_when_empty=nan_when_empty,
        zeroed=end.zeroed,
        nan_is_zero=end.nan_is_zero,
        autocast=autocast,
        notes=notes,
    )


def _to_value(view: GraphView, call: Call, index: tuple, reader: Reader, columns: Columns | None) -> Weighted:
    """Like :func:`follow_weights`; if the product is divided by the sum, the quotient is what is replaced."""
    if call.get("product") is None or (product := contraction(view, call.get("product"))) is None:
        return follow_weights(view, call.node, index, reader, columns)
    if columns is not None:
        raise Refused(Why.SINK, "the product with value is divided by a sum that holds a sink")
    return Weighted(call.node, product, call.get("weights"), index)


def _heads_beside_batch(
    view: GraphView, readers: Readers, found: Scores, rows: tuple[int, int], product: Contraction
) -> Leading:
    """The one leading dimension of the scores, split into batch and heads.

    Raises:
        Refused: no view of query or key shows the split.
    """
    shape = view.shape(found.node)
    (size,) = (extent for n, extent in enumerate(shape) if n not in rows)
    space = score_space(view, readers, shape, rows, ((b,), size, sympy.Integer(1)), products=True)
    _, inside = scores_at(view, space, found.node, found.time, product)
    at = dict(zip(product.out_labels, inside, strict=True))
    bounds = Reader(view, {b: size, h: sympy.Integer(1), q: space.q_len, k: space.k_len})
    for side in ("left", "right"):
        node, labels = product.operand(side)
        entries = operand_index(view, node, labels, {**at, **depths_of(view, product)}, {})
        heads = heads_beside_batch(view, bounds, node, entries, view.held(node).dtype)
        if heads is not None and (batch := sympy.cancel(size / heads)).is_integer:
            return (h if batch == 1 else b * heads + h,), batch, sympy.Integer(heads)
    raise Refused(Why.NOT_APART, "nothing tells batch and heads apart")


SOFTMAX = Anchor(
    "softmax",
    called("softmax"),
    (with_heads_apart, from_softmax),
    again={Why.ROWS_WITHOUT_KEYS: with_mask_as_data},
    truer=truer,
)

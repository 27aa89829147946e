"""Finds attention without a softmax: ``((q k^T) * M) v`` with M a decay mask or a triangle, or with a normaliser.

From each product of two tensors, one operand is followed upwards to another product. What lies between is read as a
term in the indices, like scores. The code that computes query and key (SiLU, a feature map) is not read.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.assemble.meaning import MAX_TERMS
from effattn.passes.candidate.record import Candidate, MatchedNodes, Refused
from effattn.passes.candidate.space import Readers, score_space
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.match.anchors.anchor import Anchor, Start
from effattn.passes.match.linear_terms import decay_of, interpret, not_attention
from effattn.passes.match.normaliser import divided, divided_later
from effattn.passes.match.products import query_key_product, scores_at
from effattn.passes.match.roles import notes_of_folding, query_and_key, sides, value_of
from effattn.passes.symbolic import CaptureSource
from effattn.passes.symbolic.decay import DecayReader
from effattn.passes.symbolic.reader import Unreadable

# operations allowed between the product of query and key and the product of weights and value
_BETWEEN = {
    *("mul", "div", "where", "masked_fill", "tril", "to", "type_as", "dropout", "identity", "reshape", "transpose"),
    *("permute", "expand"),
}
_MASKS = {"mul", "div", "where", "masked_fill", "tril"}
_FURTHEST = 12  # most operations between them


def weighted(view: GraphView, node: fx.Node) -> Start | None:
    """A product of which one operand is the result of another product after masks or factors."""
    product = contraction(view, node)
    if product is None or product.summed is None or view.writes(node):
        return None
    sides = (side for side in ("left", "right") if _leads_to_product(view, product.operand(side)[0]))
    return next((Start((product, side)) for side in sides), None)


def _leads_to_product(view: GraphView, node: fx.Node) -> bool:
    waiting, seen = [(node, False)], 0
    while waiting and seen < _FURTHEST:
        node, masked = waiting.pop(0)
        seen += 1
        if contraction(view, node) is not None:
            if masked:
                return True
            continue
        call = view.call(node)
        if call is not None and (call.name in _BETWEEN or call.name.startswith("cast_")):
            masked = masked or call.name in _MASKS
            waiting += [(source, masked) for source in node.all_input_nodes if view.tensor(source) is not None]
    return False


def from_weighted(view: GraphView, start: tuple[Contraction, str], readers: Readers) -> Candidate:
    """The candidate of a product and the side of its weights.

    Raises:
        Refused: the op does not compute it, or (``Why.NOT_ATTENTION``) the two products are no attention.
    """
    product, side = start
    weights, labels = product.operand(side)
    dim = labels.index(product.sums[0])
    scores, eps, time = divided(view, weights, dim, view.time[product.node])
    replaced = product.node
    if eps is None and (later := divided_later(view, product, side)) is not None:
        replaced, eps = later
    try:
        inner, q_dim, alone = query_key_product(view, readers, scores, dim, time, DecayReader)
    except (Refused, Unreadable) as error:
        raise not_attention(str(error)) from error
    shape = view.shape(scores)
    space = score_space(view, readers, shape, (q_dim, dim), alone=alone, products=True, kind=DecayReader)
    term, inside = scores_at(view, space, scores, time, inner)
    if sympy.count_ops(term) > MAX_TERMS:
        raise not_attention("more than a person would write")
    spec = interpret(term)
    if not spec.causal and eps is None:
        raise not_attention("two products in a row")
    if spec.causal and space.q_len != space.k_len:
        raise Refused(
            Why.LENGTHS, f"{space.q_len} queries over {space.k_len} keys: what came before would have to be a state"
        )
    _check_used_nowhere_else(view, inner.node, replaced)

    roles = sides(inner, inside)
    if roles is None:
        raise Refused(Why.PRODUCT, "query and key cannot be told apart in their product")
    query, key = query_and_key(view, inner, roles, inside, space, view.held(replaced).dtype)
    value, out_index = value_of(view, product, weights, space.index, space)
    if any(len(operand.dims[1]) > 1 for operand in (query, key, value)):
        raise Refused(Why.HEADS, "heads are in several dimensions: it is already computed in chunks")
    nodes = MatchedNodes(
        weights, replaced, query, key, value, scores=CaptureSource(scores, time), products=(inner.node, product.node)
    )
    spec = replace(
        spec,
        scale=spec.scale * float(query.factor * key.factor),
        rate=None if spec.rate is None else decay_of(view, space.reader, spec.rate, view.time[replaced]),
        normalised=eps is not None,
        eps=eps or 0.0,
    )
    notes = notes_of_folding((query, key, value))
    return Candidate(nodes, "linear", space, out_index, linear=spec, notes=notes)


def _check_used_nowhere_else(view: GraphView, product: fx.Node, replaced: fx.Node) -> None:
    """Refuse scores or weights with other users, since these would still have to be computed."""
    inside: set[fx.Node] = {replaced}
    waiting = [replaced]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in inside and source in view.time]
        inside.update(new)
        waiting += new
    waiting, seen = [product], {product, replaced}
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user not in inside:
                raise Refused(Why.WEIGHTS, f"the weights are used elsewhere (by {user.name})")
            if user not in seen:
                seen.add(user)
                waiting.append(user)


LINEAR = Anchor("linear", weighted, (from_weighted,), unspoken=frozenset({Why.NOT_ATTENTION}))  # any two products

"""Find attention without a softmax: ``((q k^T) * M) v``, with M a decay mask or a triangle, or with a normaliser.

From each product of two tensors one operand is followed upward to another product; what lies between is read as a
term in the indices, as scores are. Whatever made query and key (SiLU, a feature map) is not looked at.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from effattn.ir.expr import k, q, s
from effattn.ir.refusal import Why
from effattn.passes.assemble.meaning import MAX_TERMS
from effattn.passes.assemble.site import assemble
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.record import Draft, Match, Missed, Refused
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.match.linear_terms import LinearTerm, NotLinear, interpret, plain_captures, written
from effattn.passes.match.normaliser import divided, divided_later
from effattn.passes.match.products import (
    batch_index,
    head_dim_of,
    note_folding,
    query_and_key,
    query_key_product,
    reader_for,
    scores_at,
    sides,
    value_of,
)
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.decay import DecayReader
from effattn.passes.symbolic.reader import Unreadable

# what may stand between the product of query and key and that of weights and value
_BETWEEN = {
    *("mul", "div", "where", "masked_fill", "tril", "to", "type_as", "dropout", "identity", "reshape", "transpose"),
    *("permute", "expand"),
}
_MASKS = {"mul", "div", "where", "masked_fill", "tril"}
_FURTHEST = 12  # operations between the two


@dataclass(frozen=True)
class Loop:
    """What an attention written as a loop over blocks has beside query, key, value and rate."""

    initial: fx.Node | None  # the state before the first token, None if it is zero
    final: fx.Node | None  # the node of the state after the last
    step: bool  # token by token after a state, without a gradient
    made: frozenset[fx.Node]  # everything between the operands and the output
    rising: tuple[fx.Node, ...] = ()  # tables of decay, as in effattn::checked_decay
    falling: tuple[fx.Node, ...] = ()
    triangles: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class LinearMatch:
    """An attention without a softmax that can be replaced by the op."""

    match: Match
    term: LinearTerm  # in the names of ``match.site``
    normalised: bool
    eps: float
    loop: Loop | None = None


def find_linear(
    view: GraphView, skip: Container[fx.Node] = (), strict: bool = False
) -> tuple[list[LinearMatch], list[Missed]]:
    """Every linear attention of the graph, and what looks like one but is left alone, with the reason.

    ``skip`` holds products of which is already known what they are.

    Raises: with ``strict``, what is no refusal.
    """
    readers: dict[tuple, Reader] = {}
    found: list[LinearMatch] = []
    missed: list[Missed] = []
    for product, side in _candidates(view):
        if product.node in skip:
            continue
        with left_alone(product.node, missed, strict), suppress(NotLinear):  # any two products come here
            found.append(_match(view, product, side, readers, len(found)))
    return found, missed


def may_hold_linear(graph: fx.Graph) -> bool:
    """A quick look for two products, so that other graphs cost nothing."""
    names = ("matmul", "bmm", "einsum", "mm")
    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    return sum(str(getattr(node.target, "__name__", node.target)).strip("_") in names for node in calls) > 1


def _candidates(view: GraphView) -> Iterator[tuple[Contraction, str]]:
    """Products of which one operand comes from another product through a mask or a factor."""
    for node in view.graph.nodes:
        product = contraction(view, node)
        if product is None or product.summed is None or view.writes(node):
            continue
        for side in ("left", "right"):
            if _leads_to_product(view, product.operand(side)[0]):
                yield product, side
                break


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


def _match(view: GraphView, product: Contraction, side: str, readers: dict, order: int) -> LinearMatch:
    weights, labels = product.operand(side)
    dim = labels.index(product.sums[0])
    scores, eps, time = divided(view, weights, dim, view.time[product.node])
    replaced = product.node
    if eps is None and (later := divided_later(view, product, side)) is not None:
        replaced, eps = later
    shape = view.shape(scores)
    try:
        inner, q_dim, alone = query_key_product(view, readers, scores, shape, dim, time, DecayReader)
    except (Refused, Unreadable) as error:
        raise NotLinear(str(error)) from error
    index: list[Any] = [None] * len(shape)
    rest = [n for n in range(len(shape)) if n not in (dim, q_dim)]
    leading, batch, heads = batch_index([shape[n] for n in rest], [n in alone for n in rest])
    for n, entry in zip(rest, leading, strict=True):
        index[n] = entry
    index[q_dim], index[dim] = q, k
    q_len, k_len = shape[q_dim], shape[dim]
    reader = reader_for(view, readers, True, batch, heads, q_len, k_len, DecayReader)
    term, inside = scores_at(view, reader, scores, tuple(index), time, inner)
    if sympy.count_ops(term) > MAX_TERMS:
        raise NotLinear("more than a person would write")
    meaning = interpret(term)
    if not meaning.causal and eps is None:
        raise NotLinear("two products in a row")
    if meaning.causal and q_len != k_len:
        raise Refused(Why.LENGTHS, f"{q_len} queries over {k_len} keys: what came before would have to be a state")
    _check_used_nowhere_else(view, inner.node, replaced)

    roles = sides(inner, inside)
    if roles is None:
        raise Refused(Why.PRODUCT, "query and key cannot be told apart in their product")
    head_dim, dtype = head_dim_of(view, inner), view.held(replaced).dtype
    operands = query_and_key(view, inner, roles, inside, (batch, heads, q_len, k_len), dtype)
    value, out_index, value_dim = value_of(view, product, (weights, tuple(index)), (batch, heads, k_len))
    if any(len(operand.dims[1]) > 1 for operand in (*operands, value)):
        raise Refused(Why.HEADS, "heads lie in several dimensions: the user computes it in chunks already")
    if value.factor != 1:
        raise Refused(Why.VALUE, "value is scaled by a constant on the way to attention")
    notes: list[str] = []
    note_folding([*operands, value], notes)
    draft = Draft(
        anchor=weights,
        replaced=replaced,
        found_as="linear",
        query=operands[0],
        key=operands[1],
        value=value,
        batch=batch,
        heads=heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=value_dim,
        term=term.subs(s, operands[0].factor * operands[1].factor * s),
        scores_index=tuple(index),
        out_index=out_index,
        reader=reader,
        zero_when_empty=True,
        notes=notes,
    )
    return finished(view, assemble(view, draft, order), eps)


def finished(view: GraphView, match: Match, eps: float | None) -> LinearMatch:
    """The match with the meaning of its weights, in the names that ``assemble`` gave to captures."""
    site = match.site
    term = interpret(site.spec.score)
    if site.captures_need_grad:
        raise Refused(Why.GRADIENT_OF_DECAY, "decay is learned: it needs a gradient, which the op does not compute")
    if term.rate is not None:
        named = zip(site.spec.captures, match.anchors.captures, strict=True)
        term = replace(term, rate=plain_captures(term.rate, {load.name: view.shape(at.node) for load, at in named}))
    predicate: Any = k <= q if term.causal else site.spec.predicate
    stage = site.stage if site.needs_grad or not term.causal else "prefill"
    position = q if term.causal else None
    spec = replace(site.spec, score=written(term), predicate=predicate)
    site = replace(site, spec=spec, position=position, stage=stage)
    return LinearMatch(replace(match, site=site), term, eps is not None, eps or 0.0)


def _check_used_nowhere_else(view: GraphView, product: fx.Node, replaced: fx.Node) -> None:
    """Scores and weights must serve this attention alone: otherwise they are computed all the same."""
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

"""What a candidate computes: score and mask in closed form, and the output of queries without keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from effattn.errors import PlanError
from effattn.ir import expr, wire
from effattn.ir.attention import EmptyRows
from effattn.ir.expr import Nk, k, q
from effattn.ir.linear import LinearSpec
from effattn.ir.refusal import Why
from effattn.ir.site import Layout
from effattn.passes.candidate.naming import in_lengths, with_lengths
from effattn.passes.candidate.operands import Operand
from effattn.passes.candidate.record import Candidate, Refused
from effattn.passes.graph.contraction import contraction
from effattn.passes.graph.view import GraphView
from effattn.passes.masks import split as masks
from effattn.passes.masks.magnitude import not_overflowing, not_vanishing
from effattn.passes.masks.packed import by_index
from effattn.passes.symbolic import CaptureSource

MAX_TERMS = 400  # most operations in score and predicate; larger ones are not masks that people write


@dataclass(frozen=True)
class Meaning:
    """Score, predicate and position as in a site, with the graph's own names of captures and numbers."""

    score: Any
    predicate: Any
    position: Any | None
    empty_rows: EmptyRows
    threshold: float = masks.FILL  # scores at or below it are masked out
    linear: LinearSpec | None = None
    notes: tuple[str, ...] = ()


def meaning(view: GraphView, candidate: Candidate, layout: Layout) -> Meaning:
    """The meaning of a candidate, in the names that sites use for lengths."""
    linear = candidate.linear
    if linear is None:
        return _score_and_mask(view, candidate, layout)
    if linear.rate is not None:
        linear = replace(linear, rate=with_lengths(linear.rate, layout))
    return Meaning(linear.weight, linear.predicate, q if linear.causal else None, "never", linear=linear)


def _score_and_mask(view: GraphView, candidate: Candidate, layout: Layout) -> Meaning:
    """The meaning of attention with a softmax, with score and mask separated. A note says where fills stay in the
    score.

    Raises:
        Refused: they cannot be separated, or the result would differ from the user's.
    """
    try:
        found = masks.split(candidate.term)
    except masks.Unclear as unclear:
        raise Refused(Why.SCORE_AND_MASK, str(unclear)) from unclear
    score = with_lengths(found.score, layout)
    predicate = masks.simplify(with_lengths(by_index(found.predicate, candidate.space.reader), layout))
    _check_expressions(score, predicate)
    _check_large_numbers(view, candidate, score)
    lengths = in_lengths(layout)
    position = masks.query_position(predicate, lengths)
    if position is None and predicate == sympy.true and layout.q_len == 1 and _appended(view, candidate.nodes.key):
        position = q + Nk - 1  # decode without a mask: the query is at the last key
    _check_numbers_beside(view, candidate, score, predicate, lengths)
    dtype = _score_dtype(view, candidate)
    notes: tuple[str, ...] = ()
    try:
        empty = masks.empty_rows(
            masks.Split(score, predicate, found.fills),
            lengths,
            sdpa=candidate.zero_when_empty,
            dtype=dtype,
            data=_masks_that_are_data(view, score, candidate.space.reader.captures),
        )
    except masks.Unclear as unclear:
        if candidate.zeroed or not masks.may_stay_in_score(found, candidate.term, dtype):
            raise Refused(Why.ROWS_WITHOUT_KEYS, str(unclear), "use a boolean mask with SDPA") from unclear
        score, predicate, position = with_lengths(candidate.term, layout), sympy.true, None
        empty = "zero" if candidate.zero_when_empty else "nan"
        notes = ("a row may attend to nothing: the mask's fill values are added as the user adds them",)
    empty = _after_softmax(candidate, layout, predicate, empty)
    if empty == "mean" and any(not fill.replaces for fill in found.fills) and _is_trained(view, candidate):
        empty = "uniform"  # a fill that is added hides a key, not the gradient of its score
    return Meaning(score, predicate, position, empty, found.threshold, notes=notes)


def _is_trained(view: GraphView, candidate: Candidate) -> bool:
    """Whether the gradients of query or key are recorded."""
    nodes = candidate.nodes
    tensors = (view.held(operand.node) for operand in (nodes.query, nodes.key))
    return view.gradient_flows(view.time[nodes.replaced]) and any(tensor.requires_grad for tensor in tensors)


def _after_softmax(candidate: Candidate, layout: Layout, predicate, empty: EmptyRows) -> EmptyRows:
    """The output of queries without keys after manual division, zeroing of weights, or a sink."""
    if candidate.nan_when_empty and empty == "mean":
        empty = "nan"
    for zeroed in candidate.zeroed:
        if masks.simplify(sympy.Not(masks.simplify(with_lengths(zeroed.where, layout)))) != predicate:
            reason = "weights are set to zero by another mask than that of the scores"
            raise Refused(Why.WEIGHTS, reason, at=zeroed.node)
        empty = "zero" if zeroed.nan_too or empty == "mean" else empty
    if candidate.nan_is_zero and empty == "nan":
        empty = "zero"
    return empty if candidate.nodes.sink is None or empty == "nan" else "zero"  # a sink takes all weight without keys


def _check_large_numbers(view: GraphView, candidate: Candidate, score) -> None:
    scaled_fill = any(_is_huge(number) for number in score.atoms(sympy.Number))
    if scaled_fill and _score_dtype(view, candidate) == "float16":
        raise Refused(Why.SCORE_AND_MASK, "a fill value is scaled by data in float16, which may make it infinite")


def _check_numbers_beside(view: GraphView, candidate: Candidate, score, predicate, lengths: Layout) -> None:
    """Refuse large finite summands or factors of scores if some query may have no other keys.

    Beside such a number scores lose their digits, or it may overflow or vanish, so the result would depend on rounding.
    """
    scores = candidate.nodes.scores
    half = scores is not None and view.held(scores.node).dtype in (torch.float16, torch.bfloat16)
    rules = (
        (
            masks.not_lowered(score, masks.in_half if half else masks.in_float32),
            "a large number that is added takes its digits" + (" in half precision" if half else ""),
            "fill with -inf" + (", or add in float32" if half else ""),
        ),
        (not_overflowing(score), "a large number that is multiplied may become infinite", "fill with -inf"),
        (
            not_vanishing(score) if candidate.nan_when_empty else [],
            "the exponentials of large numbers are 0, or infinite",
            "subtract the largest score first",
        ),
    )
    for shown, reason, hint in rules:
        if shown and not masks.every_row_sees_a_key(masks.simplify(sympy.And(predicate, *shown)), lengths):
            raise Refused(Why.ROWS_WITHOUT_KEYS, f"a row may attend to nothing, and {reason}", hint)


def _check_expressions(score, predicate) -> None:
    if predicate == sympy.false:
        raise Refused(Why.EMPTY_MASK, "the mask allows nothing at all")
    if predicate.has(expr.s):
        raise Refused(Why.SCORE_AND_MASK, "the mask depends on the scores themselves")
    if not score.has(expr.s):
        raise Refused(Why.SCORE_AND_MASK, "the scores do not depend on query and key")
    if sympy.count_ops(score) + sympy.count_ops(predicate, visual=False) > MAX_TERMS:
        raise Refused(Why.SIZE, "the expression of score and mask is too large to compute in a kernel")
    for term in (score, predicate):
        try:
            wire.encode(term)
        except PlanError as error:
            raise Refused(Why.SCORE_AND_MASK, str(error)) from error


def _score_dtype(view: GraphView, candidate: Candidate) -> str:
    """The least exact dtype in which scores and masks are computed."""
    nodes = candidate.nodes
    held = {view.held(node).dtype for node in (nodes.query.node, nodes.anchor.all_input_nodes[0], nodes.replaced)}
    least = next((dtype for dtype in (torch.float16, torch.bfloat16) if dtype in held), torch.float32)
    return str(least).removeprefix("torch.")


def _masks_that_are_data(view: GraphView, score, captures: dict[str, CaptureSource]) -> frozenset[str]:
    """Captured tensors in the score that may hold a fill for some keys, such as a float mask passed by the caller.

    A bias computed by a layer (relative positions) is assumed to be finite.
    """
    huge = any(_is_huge(number) for number in score.atoms(sympy.Number))
    found = {load for load in expr.loads_of(score) if load.has(k)}
    return frozenset(load.name for load in found if huge or _may_mask(view, captures[load.name].node))


def _may_mask(view: GraphView, node: fx.Node) -> bool:
    """Whether a fill, or floats of an input that is not a parameter, reach ``node`` through arithmetic and views.

    A 0-d input of a product is not counted: it is a scale or a limit of an operand.
    """
    waiting = [(node, False)]
    seen = set(waiting)
    while waiting:
        node, multiplied = waiting.pop()
        tensor = view.tensor(node)
        if node.op == "placeholder" and tensor is not None:
            masks_some = tensor.dim() > 0 or not multiplied
            if tensor.is_floating_point() and masks_some and not isinstance(tensor, torch.nn.Parameter):
                return True
        elif view.call(node) is not None:
            if any(_is_huge(arg) for arg in (*node.args, *node.kwargs.values())):
                return True
            multiplied = multiplied or contraction(view, node) is not None
            new = [(source, multiplied) for source in node.all_input_nodes if (source, multiplied) not in seen]
            seen.update(new)
            waiting += new
    return False


def _is_huge(value: Any) -> bool:
    if isinstance(value, sympy.Number):
        value = float(value)
    return isinstance(value, (int, float)) and (abs(value) >= -masks.FILL or abs(value) == -masks.HALF_FILL)


def _appended(view: GraphView, key: Operand) -> bool:
    """Whether the last key was just concatenated to older ones, as in a growing cache."""
    call = view.call(key.node)
    if call is None or call.name != "cat" or not isinstance(call.get("dim", 0), int) or key.apart:
        return False
    parts, dim = call.get("tensors", ()), call.get("dim", 0) % len(view.shape(key.node))
    return len(parts) == 2 and dim == key.dims[2] and view.shape(parts[1])[dim] == 1

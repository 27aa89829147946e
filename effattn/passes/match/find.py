"""Finds attention: from each softmax or SDPA call outwards by data flow.

There are no templates. From a softmax, the scores are read symbolically down to one product of query and key, and the
weights are followed through views and casts to their product with value. Any code in between is accepted if it can be
read; otherwise the softmax is left alone, with the reason.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from effattn.ir.refusal import Refusal, Why
from effattn.passes.assemble.site import assemble
from effattn.passes.candidate.failures import left_alone, refusal_of
from effattn.passes.candidate.record import Match, Missed, Refused
from effattn.passes.candidate.space import Readers
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.diagnose.not_softmax import why_no_softmax
from effattn.passes.graph.provenance import location, module_path, spelled
from effattn.passes.graph.view import CHECKPOINT, GraphView
from effattn.passes.graph.vocabulary import named
from effattn.passes.graph.writes import bodies_of
from effattn.passes.match import anchors
from effattn.passes.match.anchors.anchor import Anchor
from effattn.passes.match.anchors.manual_softmax import may_hold_written_softmax
from effattn.passes.symbolic.reader import Unreadable


class MatchAttention(Pass):
    """Makes every anchor a match, or reports why it is none."""

    name = "match attention"
    fills = "matches"

    def apply(self, work: Compilation) -> bool:
        matches, missed = find(work.view, work.strict)
        work.outcome.matches += matches
        work.outcome.missed += missed
        return False


def find(view: GraphView, strict: bool = False) -> tuple[list[Match], list[Missed]]:
    """Find every attention of the graph, in order, and what looks like attention but is left alone.

    Raises:
        Exception: with ``strict``, any that is no refusal (:mod:`effattn.passes.candidate.failures`).
    """
    readers: Readers = {}
    found: dict[fx.Node, Match] = {}
    missed: dict[fx.Node, list[Missed]] = defaultdict(list)
    told: set[fx.Node] = set()  # anchors and products that the report already covers
    parts: set[fx.Node] = set()  # the other products of matches
    calls = [node for node in view.graph.nodes if node.op.startswith("call_")]
    for anchor in anchors.ANCHORS:
        for node in calls:
            with left_alone(node, missed[node], strict):
                if node in told or node in parts or (start := anchor.start(view, node)) is None:
                    continue
                told |= start.tells
                one = _match(view, anchor, start.what, readers)
                if isinstance(one, Match):
                    found[node] = one
                    told.add(node)
                    parts |= {one.nodes.replaced, *one.nodes.products}
                elif one.rule not in anchor.unspoken:
                    told.add(node)
                    missed[node].append(Missed.at(node, one))
    others: dict[tuple[str, str, Refusal], Missed] = {}  # one entry for all iterations of a loop
    for node in calls:
        with left_alone(node, missed[node], strict):
            if (refusal := why_no_softmax(view, node, told)) is not None:
                others.setdefault((module_path(node), location(node), refusal), Missed.at(node, refusal))
    matches = [_named(found[node], number) for number, node in enumerate(node for node in view.time if node in found)]
    alone = [one for node in calls for one in missed[node]] + list(others.values())
    alone += [_inside(node) for node in calls if _hides_attention(node)]
    return matches, alone + [_as_operator(node) for node in calls if _is_operator(node)]


def _match(view: GraphView, anchor: Anchor, what: Any, readers: Readers) -> Match | Refusal:
    """The match of the first candidate that can be assembled, or the first refusal that applies."""
    refusals: list[Refusal] = []
    for read in anchor.readings:
        try:
            return assemble(view, read(view, what, readers))
        except (Refused, Unreadable) as refused:
            refusals.append(refusal_of(refused))
    refusal = next((refusal for refusal in refusals if refusal.rule != Why.NOT_APART), refusals[-1])
    if (again := anchor.again.get(refusal.rule)) is not None:
        with suppress(Refused, Unreadable):
            return assemble(view, again(view, what, readers))
    return anchor.truer(view, what, refusal)


def _named(match: Match, number: int) -> Match:
    return replace(match, site=replace(match.site, name=f"{match.site.name}#{number}"))


def _hides_attention(node: fx.Node) -> bool:
    """Whether a higher-order operator has attention in its graphs."""
    if node.target is torch.ops.higher_order.flex_attention:
        return False
    return any(mentions_attention(body) for body in bodies_of(node))


def _inside(node: fx.Node) -> Missed:
    hint = "use plain checkpoints, neither nested nor with a context_fn" if node.target is CHECKPOINT else ""
    reason = f"it is inside {spelled(node)}, whose graph is not searched"
    return Missed(node.name, location(node), Refusal(Why.HIGHER_ORDER, reason, hint))


def _is_operator(node: fx.Node) -> bool:
    """Whether a node is an ATen softmax or SDPA, as in programs from torch.export."""
    if named(node.target) is not None or not isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return False
    name = str(node.target)  # "aten.softmax.int"
    return name.startswith("aten.") and ("softmax" in name or "scaled_dot_product" in name)


def _as_operator(node: fx.Node) -> Missed:
    reason = f"it is the operator {node.target} of an exported program, and these are not read"
    return Missed(node.name, location(node), Refusal(Why.OPERATOR, reason, "compile the module that was exported"))


def may_hold_attention(graph: fx.Graph) -> bool:
    """A cheap check for names of attention or two products, so that other graphs cost nothing."""
    calls = (node for node in graph.nodes if node.op.startswith("call_"))
    names = [str(getattr(node.target, "__name__", node.target)).strip("_") for node in calls]
    return mentions_attention(graph) or sum(name in ("matmul", "bmm", "einsum", "mm") for name in names) > 1


def mentions_attention(graph: fx.Graph) -> bool:
    """A quick check for anything that may be attention, so that other graphs cost nothing."""
    names = ("softmax", "attention", "transformer_encoder_layer")
    return any(
        any(name in str(getattr(node.target, "__name__", node.target)) for name in names) or _hides_attention(node)
        for node in graph.nodes
        if node.op.startswith("call_")
    ) or may_hold_written_softmax(graph)

"""Find attention: from each softmax or SDPA call outward by data flow.

No template is compared. From a softmax the scores are read symbolically down to one product of query and key, and
the weights are followed through views and casts to their product with value. What stands between does not matter as
long as it can be read; what cannot be read is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from effattn.ir.refusal import Refusal, Why
from effattn.passes.assemble.site import assemble
from effattn.passes.candidate.failures import left_alone, refusal_of
from effattn.passes.candidate.record import Draft, Match, Missed, Refused
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.diagnose.not_softmax import why_no_softmax
from effattn.passes.diagnose.reason import truer
from effattn.passes.graph.provenance import location, module_path, spelled
from effattn.passes.graph.view import CHECKPOINT, GraphView, bodies_of
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.anchors.flex import from_flex
from effattn.passes.match.anchors.manual_softmax import may_hold_written_softmax, written_softmax
from effattn.passes.match.anchors.sdpa import from_sdpa
from effattn.passes.match.anchors.softmax import from_softmax, with_heads_apart
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.reader import Unreadable


class MatchSoftmax(Pass):
    """Every softmax, SDPA and FlexAttention call becomes a match or has its reason."""

    name = "match softmaxes"

    def apply(self, work: Compilation) -> bool:
        matches, missed = find(work.view, work.strict)
        work.outcome.matches += matches
        work.outcome.missed += missed
        return False


def find(view: GraphView, strict: bool = False) -> tuple[list[Match], list[Missed]]:
    """Every attention of the graph, in order, and every softmax that is not one or is left alone.

    Raises: with ``strict``, what is no refusal (:mod:`effattn.passes.candidate.failures`).
    """
    readers: dict[tuple, Reader] = {}
    matches: list[Match] = []
    missed: list[Missed] = []
    told: set[fx.Node] = set()  # anchors and products that the report tells of
    for node in view.graph.nodes:
        with left_alone(node, missed, strict):
            if (call := _anchor(view, node)) is None:
                continue
            told.update(one for one in (node, call.get("read_by"), call.get("product")) if one is not None)
            found = _match(view, call, readers, len(matches))
            if isinstance(found, Match):
                matches.append(found)
            elif view.call(node) == call or found.rule != Why.NOT_ATTENTION:  # any quotient may look like a softmax
                missed.append(Missed.at(node, found))
    others: dict[tuple[str, str, Refusal], Missed] = {}  # all turns of a loop as one
    for node in view.graph.nodes:
        with left_alone(node, missed, strict):
            if (refusal := why_no_softmax(view, node, told)) is not None:
                others.setdefault((module_path(node), location(node), refusal), Missed.at(node, refusal))
    missed += others.values()
    missed += [_inside(node) for node in view.graph.nodes if _hides_attention(node)]
    return matches, missed + [_as_operator(node) for node in view.graph.nodes if _is_operator(node)]


def _match(view: GraphView, call: Call, readers: dict[tuple, Reader], order: int) -> Match | Refusal:
    """The first reading of an anchor that makes a site, or why the first that applies does not."""
    refusals: list[Refusal] = []
    for draft in _DRAFTS[call.name]:
        try:
            return assemble(view, draft(view, call, readers), order)
        except (Refused, Unreadable) as refused:
            refusals.append(refusal_of(refused))
    refusal = next((refusal for refusal in refusals if refusal.rule != Why.NOT_APART), refusals[-1])
    if refusal.rule == Why.ROWS_WITHOUT_KEYS and call.name == "softmax":
        try:
            return assemble(view, from_softmax(view, call, readers, mask_is_data=True), order)
        except (Refused, Unreadable):
            pass
    return truer(view, call, refusal) if call.name == "softmax" else refusal


def _hides_attention(node: fx.Node) -> bool:
    """Whether a higher-order operator has attention in the graphs that it runs."""
    if node.target is torch.ops.higher_order.flex_attention:
        return False
    return any(mentions_attention(body) for body in bodies_of(node))


def _inside(node: fx.Node) -> Missed:
    hint = "use plain checkpoints, neither nested nor with a context_fn" if node.target is CHECKPOINT else ""
    reason = f"it is inside {spelled(node)}, and graphs within the graph are not looked into"
    return Missed(node.name, location(node), Refusal(Why.HIGHER_ORDER, reason, hint))


def _is_operator(node: fx.Node) -> bool:
    """Whether a node is a softmax or SDPA of ATen, as programs are made of that torch.export made."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    return "softmax" in node.target.__name__ or "scaled_dot_product" in node.target.__name__


def _as_operator(node: fx.Node) -> Missed:
    reason = f"it is the operator {node.target} of an exported program, and these are not read"
    return Missed(node.name, location(node), Refusal(Why.OPERATOR, reason, "compile the module that was exported"))


def mentions_attention(graph: fx.Graph) -> bool:
    """A quick look for anything that could be attention, so that other graphs cost nothing."""
    names = ("softmax", "attention", "transformer_encoder_layer")
    return any(
        any(name in str(getattr(node.target, "__name__", node.target)) for name in names) or _hides_attention(node)
        for node in graph.nodes
        if node.op.startswith("call_")
    ) or may_hold_written_softmax(graph)


def _anchor(view: GraphView, node: fx.Node) -> Call | None:
    """What an attention is looked for from: a call of the table below, or a softmax that is written out."""
    call = view.call(node)
    return call if call is None or call.name in _DRAFTS else written_softmax(view, call)


# by the anchor's name: what to try, in this order
_DRAFTS: dict[str, tuple[Callable[..., Draft], ...]] = {
    "sdpa": (from_sdpa,),
    "softmax": (with_heads_apart, from_softmax),
    "flex_attention": (from_flex,),
}

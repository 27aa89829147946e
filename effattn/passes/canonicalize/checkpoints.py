"""Checkpoints of a model: inlined for the passes, and outlined again, so that they are still recomputed.

Dynamo puts the function of ``torch.utils.checkpoint`` into a separate graph, where a mask is an input and its meaning
is outside. Inlined, its nodes are in the outer graph, with the number of their region in ``meta``, which inserted nodes
inherit. Outlined, a region is a checkpoint again, whose inputs are what the attention reads now.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effattn.errors import RewriteError
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.insertion import REGION
from effattn.passes.graph.view import CHECKPOINT

SELECTIVE = "_checkpoint_context_fn"  # in the meta of a body: a selective checkpoint


@dataclass(frozen=True)
class Region:
    """One checkpoint in user code."""

    number: int
    kwargs: dict[str, Any]
    meta: dict[str, Any]  # of the call
    body_meta: dict[str, Any]


class InlineCheckpoints(Pass):
    """Inlines checkpoints, and outlines them again."""

    name = "inline checkpoints"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.regions = inline(work.gm)
        return bool(self.regions)

    def undo(self, work: Compilation) -> bool:
        outline(work.gm, self.regions)
        return bool(self.regions)


def inline(gm: fx.GraphModule) -> list[Region]:
    """Replace every plain checkpoint by its body, in place. Others are left alone."""
    regions: list[Region] = []
    for node in list(gm.graph.nodes):
        body = _plain_body(gm, node)
        if body is not None:
            number = len(regions)
            regions.append(Region(number, dict(node.kwargs), dict(node.meta), dict(body.meta)))
            _inline(gm, node, body, number)
    return regions


def outline(gm: fx.GraphModule, regions: list[Region]) -> None:
    """Make the nodes of each region a checkpoint again, including nodes inserted between them.

    Raises:
        RewriteError: regions overlap, or one would have to return something that is not a tensor.
    """
    for region in regions:
        span = _span(gm.graph, region)
        if span:
            _outline(gm, region, span)
    gm.graph.lint()


def _plain_body(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The body of a plain checkpoint, with no inputs or outputs besides the call's; None for other nodes."""
    if node.target is not CHECKPOINT or not isinstance(node.args[0], fx.Node):
        return None
    body = getattr(gm, str(node.args[0].target), None)
    if not isinstance(body, fx.GraphModule) or SELECTIVE in body.meta:
        return None
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    inner = list(body.graph.nodes)
    if any(one.op in ("get_attr", "call_module") for one in inner):  # nested graphs
        return None
    outputs = inner[-1].args[0]
    if sum(one.op == "placeholder" for one in inner) != len(node.args) - 1 or not isinstance(outputs, (tuple, list)):
        return None
    for user in node.users:
        place = user.args[1] if user.target is operator.getitem else None
        if not isinstance(place, int) or not isinstance(outputs[place], fx.Node):
            return None
    return body


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, number: int) -> None:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, call.args[1:], strict=True))
    outputs: Any = ()
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "output":
                outputs = [values.get(out) if isinstance(out, fx.Node) else out for out in node.args[0]]
            elif node.op != "placeholder":
                values[node] = gm.graph.node_copy(node, values.__getitem__)
                values[node].meta[REGION] = number
    for user in list(call.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)
    held = call.args[0]
    gm.graph.erase_node(call)
    if isinstance(held, fx.Node) and not held.users:
        gm.graph.erase_node(held)


def _span(graph: fx.Graph, region: Region) -> list[fx.Node]:
    """All nodes from the region's first to its last."""
    nodes = list(graph.nodes)
    own = [place for place, node in enumerate(nodes) if node.meta.get(REGION) == region.number]
    span = nodes[own[0] : own[-1] + 1] if own else []
    if any(node.meta.get(REGION, region.number) != region.number for node in span):
        raise RewriteError("checkpointed parts of the model were mixed up")
    return span


def _outline(gm: fx.GraphModule, region: Region, span: list[fx.Node]) -> None:
    inside = set(span)
    inputs = list(dict.fromkeys(node for one in span for node in one.all_input_nodes if node not in inside))
    outputs = [node for node in span if any(user not in inside for user in node.users)]
    if any(not isinstance(node.meta.get("example_value"), torch.Tensor) for node in outputs):
        raise RewriteError("a checkpointed part of the model would have to give something that is no tensor")
    body = fx.Graph()
    values = {}
    for node in inputs:
        values[node] = body.placeholder(node.name)
        values[node].meta.update({key: node.meta[key] for key in ("example_value", "stack_trace") if key in node.meta})
    for node in span:
        values[node] = body.node_copy(node, values.__getitem__)
        values[node].meta.pop(REGION, None)
    body.output(tuple(values[node] for node in outputs))
    held_by = {str(node.target): getattr(gm, str(node.target)) for node in span if node.op == "get_attr"}
    module = fx.GraphModule(held_by, body)
    module.meta.update(region.body_meta)
    name = f"checkpointed_{region.number}"
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(span[-1].next):
        held = gm.graph.get_attr(name)
        call = gm.graph.call_function(CHECKPOINT, (held, *inputs), region.kwargs)
        call.meta.update(region.meta)
        call.meta["example_value"] = tuple(node.meta["example_value"] for node in outputs)
        for place, node in enumerate(outputs):
            taken = gm.graph.call_function(operator.getitem, (call, place))
            taken.meta.update({key: value for key, value in node.meta.items() if key != REGION})
            node.replace_all_uses_with(taken, delete_user_cb=lambda user: user not in inside)
    for node in reversed(span):
        gm.graph.erase_node(node)

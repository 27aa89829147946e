"""The rewriting: inserts ops and erases the nodes that they make unused."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.expr import plain_scale
from effattn.lowering.forms.linear import LinearParams
from effattn.passes.candidate.record import FOUND_AS, Dropout, Match, MatchedNodes, SizeSource
from effattn.passes.choose.record import Choice
from effattn.passes.choose.routes import Route, needs_all_heads
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.block_mask_code import erase_empty_brackets, unused_batch_dims
from effattn.passes.graph.view import as_sympy
from effattn.passes.rewrite.features import features_op
from effattn.passes.rewrite.linear import linear
from effattn.passes.rewrite.loops import assumed_decays
from effattn.passes.rewrite.replacing import Emitted, Rewriting, Writer
from effattn.passes.symbolic import CaptureSource
from effattn.runtime.philox import SEEDS
from effattn.runtime.targets.sdpa import lies_well, needs_alignment


class RewriteSites(Pass):
    """Applies every choice except "keep". One that fails leaves its attention alone."""

    name = "rewrite sites"
    needs = ("choices",)

    def apply(self, work: Compilation) -> bool:
        outcome, rewriting = work.outcome, Rewriting(work)
        applied: list[Choice] = []
        for choice in outcome.choices:
            nodes, keeps_result = choice.match.nodes, choice.match.site.needs_grad
            if choice.route == "keep":
                applied.append(choice)
            else:
                with rewriting.at(nodes) as writer:
                    emitted = EMITTERS[choice.route](writer, choice)
                    pairs = [(nodes.replaced, _placed(writer, choice.match, emitted.result)), *emitted.also]
                    drawn = None if nodes.dropout is None else nodes.dropout.node
                    rewriting.replace(writer, pairs, keeps_result=keeps_result, alike=emitted.alike, drawn=drawn)
                    applied.append(choice)
        # a decomposed call that is kept reads without its mask and as one projection
        work.taken.update(one.match.nodes.replaced for one in applied if FOUND_AS in one.match.nodes.replaced.meta)
        work.taken.update(rewriting.replaced)
        outcome.choices = applied
        unread = rewriting.leave_stand_ins({choice.match.nodes.anchor.name for choice in applied})
        outcome.erased += rewriting.finish([*unread, *unused_batch_dims(work.graph)])
        erase_empty_brackets(work.graph)
        outcome.assumed += assumed_decays(work.graph)
        return bool(rewriting.replaced)


def _placed(writer: Writer, match: Match, result: fx.Node) -> fx.Node:
    """The result of an op, in the shape and memory order of the node that the site replaces."""
    factor = match.nodes.value.factor
    result = result if factor == 1 else writer.call(operator.mul, result, float(factor))
    return match.placement.emit(writer.graph, result, writer.annotate)


def _features(writer: Writer, choice: Choice) -> Emitted:
    assert isinstance(choice.params, LinearParams)
    operands = writer.operands(choice.match.nodes)
    scale = _scale(choice) if choice.params.window else None
    return Emitted(features_op(writer, choice.match.site, choice.params, operands, scale, choice.target))


def _sdpa(writer: Writer, choice: Choice) -> Emitted:
    site = choice.match.site
    query, key, value = (_as_kernels_read(writer, node) for node in writer.operands(choice.match.nodes))
    scale = _scale(choice)
    if not isinstance(scale, float) or scale <= 0:
        # SDPA makes a number of the graph a constant, and its kernels mask and take the maximum before they scale
        query, scale = writer.call(operator.mul, query, scale), 1.0
    kwargs: dict[str, Any] = {"is_causal": site.spec.predicate != sympy.true, "scale": scale}
    if site.spec.dropout:
        kwargs["dropout_p"] = site.spec.dropout
    if needs_all_heads(site):
        key, value = (writer.method("repeat_interleave", node, site.layout.groups, 1) for node in (key, value))
    elif site.layout.groups > 1:
        kwargs["enable_gqa"] = True
    return Emitted(writer.call(F.scaled_dot_product_attention, query, key, value, **kwargs))


def _as_kernels_read(writer: Writer, node: fx.Node) -> fx.Node:
    """``node``, or a copy if SDPA's kernels do not accept its strides."""
    held = node.meta["example_value"]
    if not needs_alignment(held.device.type):
        return node
    sizes, strides = ([as_sympy(number) for number in numbers] for numbers in (held.shape, held.stride()))
    if lies_well(sizes, strides, as_sympy(held.storage_offset()), held.element_size()):
        return node
    return writer.method("clone", node, memory_format=torch.contiguous_format)  # contiguous() ignores size-1 strides


def _scale(choice: Choice) -> Any:
    """The factor of a score that is a multiple of query . key: a number, or the node that holds it."""
    site = choice.match.site
    scale = plain_scale(site.spec.score)
    return (
        float(scale) if scale.is_number else dict(zip(site.spec.numbers, choice.match.numbers, strict=True))[scale.name]
    )


def _op(writer: Writer, choice: Choice) -> Emitted:
    assert choice.plan is not None
    nodes = choice.match.nodes
    plan = choice.plan if nodes.lse is None else choice.plan.reading_lse()
    args = op_arguments(writer, choice.match)
    if nodes.dropout is not None:
        args[3].append(_seed(writer, nodes.dropout))
    first_keys = writer.maps.first_keys(writer, plan, args, _when(writer, nodes))
    if first_keys is not None:
        args[3].append(first_keys)
        plan = plan.complete
    plan, blocks = writer.maps.of(writer, plan, args, _when(writer, nodes))
    both = writer.call(torch.ops.effattn.attend.default, *args, plan.encode(), *([] if blocks is None else [blocks]))
    out = writer.call(operator.getitem, both, 0)
    if nodes.lse is not None:
        lse = writer.call(operator.mul, writer.call(operator.getitem, both, 1), 1 / math.log(2.0))  # flex_attention's
        return Emitted(out, ((nodes.lse, lse),))
    return Emitted(out if nodes.sink is None else _beside_sink(writer, both, out, nodes))


def _seed(writer: Writer, dropout: Dropout) -> fx.Node:
    """What the op makes random bits of, drawn where user code drew them. Its device is that of the weights."""
    device = dropout.node.meta["example_value"].device
    with writer.graph.inserting_before(dropout.node):
        return writer.call(torch.randint, 0, SEEDS, (), dtype=torch.int64, device=device)


def _beside_sink(writer: Writer, both: fx.Node, out: fx.Node, nodes: MatchedNodes) -> fx.Node:
    """``out`` times the weight that the sink leaves to the keys of each query."""
    sink: Any = nodes.sink
    if isinstance(sink, CaptureSource):
        sink = writer.method("float", writer.load(sink, _when(writer, nodes)))
        if sink.meta["example_value"].shape[-1] != 1:
            sink = writer.call(torch.logsumexp, sink, -1, keepdim=True)
    lse = writer.method("unsqueeze", writer.call(operator.getitem, both, 1), -1)
    share = writer.call(torch.sigmoid, writer.call(operator.sub, lse, sink))
    return writer.method("to", writer.call(operator.mul, out, share), out.meta["example_value"].dtype)


def _when(writer: Writer, nodes: MatchedNodes) -> int:
    return writer.view.time[nodes.before or nodes.replaced]


def op_arguments(writer: Writer, match: Match) -> tuple[Any, ...]:
    """The arguments of ``effattn::attend`` at a site without the plan: query, key, value, captures, scalars,
    numbers."""
    captures = [writer.load(source, _when(writer, match.nodes)) for source in match.captures]
    scalars = [_length(writer, source) for source in match.scalars]
    return (*writer.operands(match.nodes), captures, scalars, list(match.numbers))


def _length(writer: Writer, source: SizeSource) -> fx.Node:
    node = writer.now(source.node)
    return node if source.dim is None else writer.method("size", node, source.dim)


# by the route of a choice
EMITTERS: dict[Route, Callable[[Writer, Choice], Emitted]] = {
    "sdpa": _sdpa,
    "op": _op,
    "features": _features,
    "linear": linear,
}

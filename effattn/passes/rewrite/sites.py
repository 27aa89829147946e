"""The rewriting: op nodes in, the nodes that they orphan out."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.expr import plain_scale
from effattn.lowering.forms.linear import LinearParams
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.record import FOUND_AS, Anchors, SizeSource
from effattn.passes.choose.choice import Choice, ChooseForms, needs_all_heads
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.block_mask_code import erase_empty_brackets, unused_batch_dims
from effattn.passes.graph.view import as_sympy
from effattn.passes.rewrite.features import features_op
from effattn.passes.rewrite.replacing import Rewriting, Writer
from effattn.runtime.targets.sdpa import lies_well, needs_alignment


class RewriteSites(Pass):
    """Every choice that is not "keep" is applied; one that fails leaves its attention alone."""

    name = "rewrite sites"
    needs = (ChooseForms,)

    def apply(self, work: Compilation) -> bool:
        outcome, view = work.outcome, work.view
        rewriting = Rewriting(view)
        applied: list[Choice] = []
        for choice in outcome.choices:
            node = choice.match.anchors.replaced
            with left_alone(node, outcome.missed, work.strict):
                if choice.route != "keep":
                    with rewriting.at(node, choice.match.anchors.before) as writer:
                        rewriting.replace(writer, _pairs(writer, choice), keeps_result=choice.match.site.needs_grad)
                applied.append(choice)
                if FOUND_AS in node.meta:
                    work.taken.add(node)  # kept as it was decomposed: without its mask, projected once
        work.taken.update(rewriting.replaced)
        outcome.choices = applied
        unread = rewriting.leave_stand_ins({choice.match.anchors.anchor for choice in applied})
        outcome.erased += rewriting.finish([*unread, *unused_batch_dims(view.graph)])
        erase_empty_brackets(view.graph)
        return bool(rewriting.replaced)


def _pairs(writer: Writer, choice: Choice) -> list[tuple[fx.Node, fx.Node]]:
    """(node, replacement) for what a site computes."""
    anchors = choice.match.anchors
    result = _result(writer, choice)
    pairs = [(anchors.replaced, anchors.placement.emit(writer.graph, result, writer.annotate))]
    if anchors.lse is not None:
        pairs.append((anchors.lse, _lse(writer, result)))
    return pairs


def _operands(writer: Writer, anchors: Anchors) -> list[fx.Node]:
    dtype = anchors.replaced.meta["example_value"].dtype
    return [writer.operand(operand, dtype) for operand in (anchors.query, anchors.key, anchors.value)]


def _result(writer: Writer, choice: Choice) -> fx.Node:
    found, factor = _attention(writer, choice), choice.match.anchors.value.factor
    return found if factor == 1 else writer.call(operator.mul, found, float(factor))


def _attention(writer: Writer, choice: Choice) -> fx.Node:
    if choice.route == "sdpa":
        return _sdpa(writer, choice)
    if choice.route == "linear":
        assert isinstance(choice.params, LinearParams)
        operands = _operands(writer, choice.match.anchors)
        scale = _scale(choice) if choice.params.window else None
        return features_op(writer, choice.match.site, choice.params, operands, scale, choice.target)
    return _op(writer, choice)


def _sdpa(writer: Writer, choice: Choice) -> fx.Node:
    site, anchors = choice.match.site, choice.match.anchors
    query, key, value = (_as_kernels_read(writer, node) for node in _operands(writer, anchors))
    scale = _scale(choice)
    if not isinstance(scale, float) or scale <= 0:
        # SDPA fixes a number of the graph, and its kernels mask, and find the largest score, before they scale
        query, scale = writer.call(operator.mul, query, scale), 1.0
    kwargs: dict[str, Any] = {"is_causal": site.spec.predicate != sympy.true, "scale": scale}
    if needs_all_heads(site):
        key, value = (writer.method("repeat_interleave", node, site.layout.groups, 1) for node in (key, value))
    elif site.layout.groups > 1:
        kwargs["enable_gqa"] = True
    return writer.call(F.scaled_dot_product_attention, query, key, value, **kwargs)


def _as_kernels_read(writer: Writer, node: fx.Node) -> fx.Node:
    """``node``, or a copy of it where SDPA's kernels do not take it as it lies."""
    held = node.meta["example_value"]
    if not needs_alignment(held.device.type):
        return node
    sizes, strides = ([as_sympy(number) for number in numbers] for numbers in (held.shape, held.stride()))
    if lies_well(sizes, strides, as_sympy(held.storage_offset()), held.element_size()):
        return node
    return writer.method("clone", node, memory_format=torch.contiguous_format)  # contiguous() would not look at one row


def _scale(choice: Choice) -> Any:
    """The factor of a score that is a plain multiple of query . key: a number, or the node that holds it."""
    site = choice.match.site
    scale = plain_scale(site.spec.score)
    return (
        float(scale)
        if scale.is_number
        else dict(zip(site.spec.numbers, choice.match.anchors.numbers, strict=True))[scale.name]
    )


def _op(writer: Writer, choice: Choice) -> fx.Node:
    assert choice.plan is not None
    anchors = choice.match.anchors
    plan = choice.plan if anchors.lse is None else choice.plan.reading_lse()
    args = (*op_arguments(writer, anchors), plan.encode())
    both = writer.call(torch.ops.effattn.attend.default, *args)
    out = writer.call(operator.getitem, both, 0)
    sink = choice.match.anchors.sink
    if sink is None:
        return out
    if isinstance(sink, float):
        return _beside_sink(writer, both, out, sink)
    score = writer.load(sink, _when(writer, choice.match.anchors))
    score = writer.method("float", score)
    if score.meta["example_value"].shape[-1] != 1:
        score = writer.call(torch.logsumexp, score, -1, keepdim=True)
    return _beside_sink(writer, both, out, score)


def _beside_sink(writer: Writer, both: fx.Node, out: fx.Node, sink: fx.Node | float) -> fx.Node:
    """``out`` with the weight that a sink, [B, H, Nq, 1] in float32 or one number, leaves to the keys of each row."""
    lse = writer.method("unsqueeze", writer.call(operator.getitem, both, 1), -1)
    share = writer.call(torch.sigmoid, writer.call(operator.sub, lse, sink))
    return writer.method("to", writer.call(operator.mul, out, share), out.meta["example_value"].dtype)


def _when(writer: Writer, anchors: Anchors) -> int:
    return writer.view.time[anchors.before or anchors.replaced]


def op_arguments(writer: Writer, anchors: Anchors) -> tuple[Any, ...]:
    """What ``effattn::attend`` takes at a site, all but the plan: query, key, value, captures, scalars, numbers."""
    operands = _operands(writer, anchors)
    captures = [writer.load(source, _when(writer, anchors)) for source in anchors.captures]
    scalars = [_length(writer, source) for source in anchors.scalars]
    return (*operands, captures, scalars, list(anchors.numbers))


def _lse(writer: Writer, result: fx.Node) -> fx.Node:
    """The op's LSE in base 2, as flex_attention gives it."""
    lse = writer.call(operator.getitem, result.args[0], 1)
    return writer.call(operator.mul, lse, 1 / math.log(2.0))


def _length(writer: Writer, source: SizeSource) -> fx.Node:
    node = writer.now(source.node)
    return node if source.dim is None else writer.method("size", node, source.dim)

"""The rewriting: op nodes in, the nodes that they orphan out. The only pass that changes the graph."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

import effattn.runtime.attend  # noqa: F401  (registers torch.ops.effattn)
from effattn.errors import RewriteError
from effattn.ir.expr import plain_scale
from effattn.lowering.forms.linear import LinearParams
from effattn.passes.block_mask import erase_empty_brackets, unused_batch_dims
from effattn.passes.choose import Choice, needs_all_heads
from effattn.passes.draft import Anchors, SizeSource
from effattn.passes.erase import erase_orphans
from effattn.passes.graph import GraphView
from effattn.passes.insert import Inserter, difference, fake_mode
from effattn.passes.metadata import leave_stand_ins
from effattn.passes.operands import Operand, emit
from effattn.passes.reading import LoadSource
from effattn.passes.rewrite_features import features_op
from effattn.passes.strides import in_order_of


def rewrite(view: GraphView, choices: list[Choice]) -> int:
    """Apply every choice that is not "keep"; returns the number of nodes that disappeared.

    Raises:
        RewriteError: a replacement does not have the shape, dtype or device of what it replaces.
    """
    before = len(view.graph.nodes)
    saved = SavedLoads(view)
    replaced: list[fx.Node] = []
    inserted = 0
    for choice in choices:
        if choice.route == "keep":
            continue
        anchors = choice.match.anchors
        node = anchors.replaced
        with view.graph.inserting_before(anchors.before or node):
            writer = Writer(view, node)
            result = _result(writer, choice, saved)
            pairs = [(node, anchors.placement.emit(view.graph, result, writer.remember))]
            if anchors.lse is not None:
                pairs.append((anchors.lse, _lse(writer, result)))
            for old, new in pairs:
                if wrong := difference(old.meta["example_value"], new.meta["example_value"]):
                    raise RewriteError(f"replacement of {old.name} is {wrong}")
                new = in_order_of(view, writer, old, new)
                if choice.match.site.needs_grad and view.writes_between(old, view.time[old], len(view.time)):
                    new = writer.method("clone", new)  # the op keeps its result for the gradient, a product did not
                old.replace_all_uses_with(new)
                replaced.append(old)
        inserted += len(writer.nodes)
    written, unread = leave_stand_ins(view, replaced, {choice.match.anchors.anchor for choice in choices})
    inserted += written
    erase_orphans(view, [*replaced, *unread, *unused_batch_dims(view.graph)])
    erase_empty_brackets(view.graph)
    return before + inserted + saved.count - len(view.graph.nodes)


class Writer(Inserter):
    """Inserts the replacement of one site."""

    def __init__(self, view: GraphView, like: fx.Node):
        super().__init__(view.graph, like)
        self.view = view

    def operand(self, operand: Operand, dtype: torch.dtype) -> fx.Node:
        """Query, key or value as [B, H, N, D] in the dtype of the result (autocast may have cast it)."""
        node = emit(self.graph, operand, self.remember)
        return node if node.meta["example_value"].dtype == dtype else self.method("to", node, dtype)


def _operands(writer: Writer, anchors: Anchors) -> list[fx.Node]:
    dtype = anchors.replaced.meta["example_value"].dtype
    return [writer.operand(operand, dtype) for operand in (anchors.query, anchors.key, anchors.value)]


def _result(writer: Writer, choice: Choice, saved: SavedLoads) -> fx.Node:
    found, factor = _attention(writer, choice, saved), choice.match.anchors.value.factor
    return found if factor == 1 else writer.call(operator.mul, found, float(factor))


def _attention(writer: Writer, choice: Choice, saved: SavedLoads) -> fx.Node:
    if choice.route == "sdpa":
        return _sdpa(writer, choice)
    if choice.route == "linear":
        assert isinstance(choice.params, LinearParams)
        operands = _operands(writer, choice.match.anchors)
        scale = _scale(choice) if choice.params.window else None
        return features_op(writer, choice.match.site, choice.params, operands, scale, choice.target)
    return _op(writer, choice, saved)


def _sdpa(writer: Writer, choice: Choice) -> fx.Node:
    site, anchors = choice.match.site, choice.match.anchors
    query, key, value = _operands(writer, anchors)
    scale = _scale(choice)
    if not isinstance(scale, float) or scale <= 0:
        # SDPA fixes a number of the graph, and its kernels mask, and find the largest score, before they scale
        query, scale = writer.call(operator.mul, query, scale), 1.0
    kwargs: dict[str, Any] = {"is_causal": site.predicate != sympy.true, "scale": scale}
    if needs_all_heads(site):
        key, value = (writer.method("repeat_interleave", node, site.layout.groups, 1) for node in (key, value))
    elif site.layout.groups > 1:
        kwargs["enable_gqa"] = True
    return writer.call(F.scaled_dot_product_attention, query, key, value, **kwargs)


def _scale(choice: Choice) -> Any:
    """The factor of a score that is a plain multiple of query . key: a number, or the node that holds it."""
    site = choice.match.site
    scale = plain_scale(site.score)
    return (
        float(scale)
        if scale.is_number
        else dict(zip(site.numbers, choice.match.anchors.numbers, strict=True))[scale.name]
    )


def _op(writer: Writer, choice: Choice, saved: SavedLoads) -> fx.Node:
    assert choice.plan is not None
    anchors = choice.match.anchors
    plan = choice.plan if anchors.lse is None else choice.plan.reading_lse()
    args = (*op_arguments(writer, anchors, saved), plan.encode())
    both = writer.call(torch.ops.effattn.attend.default, *args)
    out = writer.call(operator.getitem, both, 0)
    sink = choice.match.anchors.sink
    if sink is None:
        return out
    if isinstance(sink, float):
        return _beside_sink(writer, both, out, sink)
    score = saved.at(sink, _when(writer, choice.match.anchors))
    return _beside_sink(writer, both, out, writer.method("float", score))


def _beside_sink(writer: Writer, both: fx.Node, out: fx.Node, sink: fx.Node | float) -> fx.Node:
    """``out`` with the weight that a sink, [B, H, Nq, 1] in float32 or one number, leaves to the keys of each row."""
    lse = writer.method("unsqueeze", writer.call(operator.getitem, both, 1), -1)
    share = writer.call(torch.sigmoid, writer.call(operator.sub, lse, sink))
    return writer.method("to", writer.call(operator.mul, out, share), out.meta["example_value"].dtype)


def _when(writer: Writer, anchors: Anchors) -> int:
    return writer.view.time[anchors.before or anchors.replaced]


def op_arguments(writer: Writer, anchors: Anchors, saved: SavedLoads) -> tuple[Any, ...]:
    """What ``effattn::attend`` takes at a site, all but the plan: query, key, value, loads, scalars, numbers."""
    operands = _operands(writer, anchors)
    loads = [saved.at(source, _when(writer, anchors)) for source in anchors.loads]
    scalars = [_length(writer, source) for source in anchors.scalars]
    return (*operands, loads, scalars, list(anchors.numbers))


def _lse(writer: Writer, result: fx.Node) -> fx.Node:
    """The op's LSE in base 2, as flex_attention gives it."""
    lse = writer.call(operator.getitem, result.args[0], 1)
    return writer.call(operator.mul, lse, 1 / math.log(2.0))


def _length(writer: Writer, source: SizeSource) -> fx.Node:
    return source.node if source.dim is None else writer.method("size", source.node, source.dim)


class SavedLoads:
    """Loads as the author's code read them. Where memory is written in between, a copy is taken before the write."""

    def __init__(self, view: GraphView):
        self.view, self.count = view, 0
        self.copies: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def at(self, source: LoadSource, time: int) -> fx.Node:
        writers = self.view.writes_between(source.node, source.time - 1, time)
        if not writers:
            return source.node
        key = (source.node, writers[0])
        if key not in self.copies:
            with self.view.graph.inserting_before(writers[0]):
                copy = self.view.graph.call_method("clone", (source.node,))
            copy.meta.update({k: v for k, v in source.node.meta.items() if k in ("stack_trace", "nn_module_stack")})
            with fake_mode(source.node):
                copy.meta["example_value"] = source.node.meta["example_value"].clone()
            self.copies[key] = copy
            self.count += 1
        return self.copies[key]

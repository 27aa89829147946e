"""Linear attention into the graph: the op, with its decay computed from what the author's code computes it from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

import effattn.runtime.linear  # noqa: F401  (registers torch.ops.effattn.linear)
from effattn.errors import RewriteError
from effattn.ir import expr
from effattn.ir.expr import h
from effattn.ir.fold import fold
from effattn.ir.refusal import Why
from effattn.ir.text import text
from effattn.passes.choose import check_target
from effattn.passes.draft import Missed, Refused
from effattn.passes.erase import erase_orphans
from effattn.passes.graph import GraphView, as_sympy
from effattn.passes.insert import difference
from effattn.passes.known import Known
from effattn.passes.match_linear import LinearMatch
from effattn.passes.rewrite import SavedLoads, Writer
from effattn.passes.rewrite_blocks import checked_rate, loop_ops, same_shape
from effattn.passes.strides import in_order_of


def rewrite_linear(
    view: GraphView, found: list[LinearMatch], target: str | None, known: Known
) -> tuple[list[LinearMatch], list[Missed], int]:
    """Replace every match: (those that were, those that could not be, number of nodes that disappeared).

    Raises:
        RewriteError: a replacement does not have the shape, dtype or device of what it replaces.
        TargetError: ``target`` is "triton", and a site is where no kernel can run.
    """
    before = len(view.graph.nodes)
    saved = SavedLoads(view)
    done: list[LinearMatch] = []
    missed: list[Missed] = []
    replaced: list[fx.Node] = []
    inserted = 0
    for one in found:
        site, anchors = one.match.site, one.match.anchors
        check_target(site, target)
        node = anchors.replaced
        with view.graph.inserting_before(node):
            writer = Writer(view, node)
            try:
                rate = _rate(writer, one, saved)
                if one.loop is not None:
                    rate = checked_rate(writer, one.loop, rate, known)
            except Refused as refused:
                writer.undo()
                missed.append(Missed(site.name, site.location, refused.refusal))
                continue
            if one.loop is not None:
                pairs = loop_ops(writer, one, one.loop, rate, target)
            else:
                pairs = [(node, anchors.placement.emit(view.graph, _op(writer, one, rate, target), writer.remember))]
            for old, new in pairs:
                # that blocks together have the length of what they were cut from may take guards to see
                equal = one.loop is not None and same_shape(old.meta["example_value"], new.meta["example_value"])
                if not equal and (wrong := difference(old.meta["example_value"], new.meta["example_value"])):
                    raise RewriteError(f"replacement of {old.name} is {wrong}")
                old.replace_all_uses_with(in_order_of(view, writer, old, new))
                replaced.append(old)
        inserted += len(writer.nodes)
        done.append(one)
    erase_orphans(view, replaced)
    return done, missed, before + inserted + saved.count - len(view.graph.nodes)


def _op(writer: Writer, one: LinearMatch, rate: fx.Node | None, target: str | None) -> fx.Node:
    anchors = one.match.anchors
    dtype = anchors.replaced.meta["example_value"].dtype
    operands = [writer.operand(operand, dtype) for operand in (anchors.query, anchors.key, anchors.value)]
    meaning = (one.term.scale, one.term.causal, one.normalised, one.eps, one.match.site.output_layout, target)
    both = writer.call(torch.ops.effattn.linear.default, *operands, rate, None, *meaning)
    return writer.call(operator.getitem, both, 0)


def _rate(writer: Writer, one: LinearMatch, saved: SavedLoads) -> fx.Node | None:
    """The logarithm of each head's decay, [H] float32, as nodes that read the author's own tensors."""
    if one.term.rate is None:
        return None
    site, anchors = one.match.site, one.match.anchors
    heads, time = int(site.layout.heads), writer.view.time[anchors.replaced]
    named = zip(site.loads, anchors.loads, strict=True)
    sources = {spec.name: source for spec, source in named}
    values: dict[str, fx.Node] = dict(zip(site.numbers, anchors.numbers, strict=True))
    swap: dict[Any, Any] = {}
    for number, load in enumerate(expr.loads_of(one.term.rate)):
        swap[load] = sympy.Symbol(f"load_{number}", real=True)
        values[f"load_{number}"] = _per_head(writer, saved.at(sources[load.name], time), load, heads)
    device = anchors.query.node.meta["example_value"].device
    value = fold(one.term.rate.xreplace(swap), _Nodes(writer, values, heads, device))
    if not isinstance(value, fx.Node) or not isinstance(value.meta["example_value"], torch.Tensor):
        return writer.call(torch.full, (heads,), value, dtype=torch.float32, device=device)
    if value.meta["example_value"].dim() == 0:
        value = writer.method("expand", value, (heads,))
    return value


def _per_head(writer: Writer, node: fx.Node, load: expr.Load, heads: int) -> fx.Node:
    """The elements of a tensor that a load reads, one for each head, float32: [H], or 0-d if all heads read one.

    Raises:
        Refused: the load depends on more than the head.
    """
    kept = [dim for dim, index in enumerate(load.indices) if index == h]
    others = [(dim, index) for dim, index in enumerate(load.indices) if index != h]
    if len(kept) > 1 or not all(index.is_Integer and index >= 0 for _, index in others):
        raise Refused(Why.DECAY, f"decay is not one number per head: {text(load)}")
    for dim, index in reversed(others):
        node = writer.call(torch.select, node, dim, int(index))
    held = node.meta["example_value"]
    if kept and (as_sympy(held.shape[0]) != heads or held.dim() != 1):
        raise Refused(Why.DECAY, f"decay is read from {list(held.shape)} numbers for {heads} heads")
    return node if held.dtype == torch.float32 else writer.method("to", node, torch.float32)


class _Nodes:
    """Terms of one number per head as nodes: [H] float32, or 0-d where they do not depend on the head."""

    CALLS: ClassVar[dict[str, Callable[..., Any]]] = {
        "add": operator.add,
        "mul": operator.mul,
        "div": operator.truediv,
        "exp": torch.exp,
        "log": torch.log,
        "sqrt": torch.sqrt,
        "abs": torch.abs,
        "tanh": torch.tanh,
    }

    def __init__(self, writer: Writer, values: dict[str, fx.Node], heads: int, device: torch.device):
        self.writer, self.values, self.heads, self.device = writer, values, heads, device

    def constant(self, value: Any) -> Any:
        return value

    def symbol(self, name: str) -> Any:
        if name == str(h):
            return self.writer.call(torch.arange, self.heads, dtype=torch.float32, device=self.device)
        if name in self.values:
            return self.values[name]
        raise Refused(Why.DECAY, f"decay depends on {name}")

    def load(self, name: str, indices: list[Any]) -> Any:
        raise AssertionError("loads are symbols here")

    def call(self, operation: str, *args: Any) -> Any:
        function = self.CALLS.get(operation)
        if function is None:
            raise Refused(Why.DECAY, f"decay is computed with {operation}, which is not understood")
        if not any(isinstance(arg, fx.Node) for arg in args):
            return float(function(*[torch.tensor(float(arg), dtype=torch.float64) for arg in args]))
        return self.writer.call(function, *args)

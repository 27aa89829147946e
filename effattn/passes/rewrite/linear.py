"""Linear attention into the graph: the op, with its decay computed from what the user's code computes it from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import sympy
import torch
from torch import fx

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir import expr
from effattn.ir.expr import h
from effattn.ir.fold import fold
from effattn.ir.refusal import Why
from effattn.ir.text import text
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.record import Refused
from effattn.passes.choose.choice import check_target
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.known_values import Known
from effattn.passes.graph.view import as_sympy
from effattn.passes.match.anchors.linear import LinearMatch, find_linear, may_hold_linear
from effattn.passes.match.anchors.loop import find_blocks
from effattn.passes.rewrite.loops import assumed_decays, checked_rate, loop_ops, same_shape
from effattn.passes.rewrite.replacing import Rewriting, Writer
from effattn.passes.rewrite.sites import RewriteSites


class ReplaceLinear(Pass):
    """Attention without a softmax, written whole or as a loop over blocks, becomes the op of linear attention."""

    name = "replace linear attention"
    optional = True
    needs = (RewriteSites,)

    def apply(self, work: Compilation) -> bool:
        if not may_hold_linear(work.graph):
            return False
        outcome, view = work.outcome, work.view
        loops, left_loops, seen = find_blocks(view, work.strict)
        linear, missed = find_linear(view, seen, work.strict)
        outcome.missed += left_loops + missed
        rewriting, known = Rewriting(view), Known(view, work.inputs)
        for one in loops + linear:
            node = one.match.anchors.replaced
            with left_alone(node, outcome.missed, work.strict), rewriting.at(node) as writer:
                check_target(one.match.site, work.target)
                rewriting.replace(writer, _pairs(writer, one, work.target, known), alike=_fits(one))
                outcome.linear.append(one)
        work.taken.update(rewriting.replaced)
        outcome.erased += rewriting.finish()
        outcome.assumed += assumed_decays(work.graph)
        return bool(rewriting.replaced)


def _pairs(writer: Writer, one: LinearMatch, target: str | None, known: Known) -> list[tuple[fx.Node, fx.Node]]:
    """(node, replacement) for what a match computes."""
    anchors, rate = one.match.anchors, _rate(writer, one)
    if one.loop is not None:
        return loop_ops(writer, one, one.loop, checked_rate(writer, one.loop, rate, known), target)
    return [(anchors.replaced, anchors.placement.emit(writer.graph, _op(writer, one, rate, target), writer.annotate))]


def _fits(one: LinearMatch) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """That blocks together have the length of what they were cut from may take guards to see."""
    return same_shape if one.loop is not None else lambda old, new: False


def _op(writer: Writer, one: LinearMatch, rate: fx.Node | None, target: str | None) -> fx.Node:
    anchors = one.match.anchors
    dtype = anchors.replaced.meta["example_value"].dtype
    operands = [writer.operand(operand, dtype) for operand in (anchors.query, anchors.key, anchors.value)]
    meaning = (one.term.scale, one.term.causal, one.normalised, one.eps, one.match.site.output_layout, target)
    both = writer.call(torch.ops.effattn.linear.default, *operands, rate, None, *meaning)
    return writer.call(operator.getitem, both, 0)


def _rate(writer: Writer, one: LinearMatch) -> fx.Node | None:
    """The logarithm of each head's decay, [H] float32, as nodes that read the user's own tensors."""
    if one.term.rate is None:
        return None
    site, anchors = one.match.site, one.match.anchors
    heads, time = int(site.layout.heads), writer.view.time[anchors.replaced]
    named = zip(site.spec.captures, anchors.captures, strict=True)
    sources = {spec.name: source for spec, source in named}
    values: dict[str, fx.Node] = dict(zip(site.spec.numbers, anchors.numbers, strict=True))
    swap: dict[Any, Any] = {}
    for number, load in enumerate(expr.loads_of(one.term.rate)):
        swap[load] = sympy.Symbol(f"load_{number}", real=True)
        values[f"load_{number}"] = _per_head(writer, writer.load(sources[load.name], time), load, heads)
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
        raise AssertionError("captures are symbols here")

    def call(self, operation: str, *args: Any) -> Any:
        function = self.CALLS.get(operation)
        if function is None:
            raise Refused(Why.DECAY, f"decay is computed with {operation}, which is not understood")
        if not any(isinstance(arg, fx.Node) for arg in args):
            return float(function(*[torch.tensor(float(arg), dtype=torch.float64) for arg in args]))
        return self.writer.call(function, *args)

"""Inserts the op of linear attention; its decay is computed from the user's own tensors."""

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
from effattn.passes.candidate.record import Loop, Match, Refused
from effattn.passes.choose.record import Choice
from effattn.passes.graph.view import as_sympy
from effattn.passes.rewrite.loops import checked, same_shape
from effattn.passes.rewrite.replacing import Emitted, Writer


def linear(writer: Writer, choice: Choice) -> Emitted:
    """Write the op of linear attention, with the state after a loop where the graph computes it."""
    site, spec, nodes = choice.match.site, choice.match.site.linear, choice.match.nodes
    assert spec is not None
    loop = nodes.loop or Loop(None, None)
    rate, operands = checked(writer, loop, rate_of(writer, choice.match)), writer.operands(nodes)
    state = None if loop.initial is None else _cast(writer, writer.now(loop.initial), torch.float32)
    if spec.state == "stepped":
        step = (*operands, state, rate, spec.scale, spec.normalised, spec.eps, choice.target)
        both = writer.call(torch.ops.effattn.linear_step.default, *step)
    else:
        meaning = (spec.scale, spec.causal, spec.normalised, spec.eps, site.output_layout, choice.target)
        both = writer.call(torch.ops.effattn.linear.default, *operands, rate, state, *meaning)
    out = writer.call(operator.getitem, both, 0)
    if nodes.loop is None:
        return Emitted(out)
    if loop.final is None:
        return Emitted(out, alike=same_shape)
    left = _cast(writer, writer.call(operator.getitem, both, 1), loop.final.meta["example_value"].dtype)
    return Emitted(out, ((loop.final, left),), same_shape)


def _cast(writer: Writer, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["example_value"].dtype == dtype else writer.method("to", node, dtype)


def rate_of(writer: Writer, match: Match) -> fx.Node | None:
    """The logarithm of each head's decay, [H] float32, computed from the user's own tensors."""
    site = match.site
    if site.linear is None or site.linear.rate is None:
        return None
    heads, time = int(site.layout.heads), writer.view.time[match.nodes.replaced]
    sources = dict(zip((load.name for load in site.spec.captures), match.captures, strict=True))
    values: dict[str, fx.Node] = dict(zip(site.spec.numbers, match.numbers, strict=True))
    swap: dict[Any, Any] = {}
    for number, load in enumerate(expr.loads_of(site.linear.rate)):
        swap[load] = sympy.Symbol(f"load_{number}", real=True)
        values[f"load_{number}"] = _per_head(writer, writer.load(sources[load.name], time), load, heads)
    device = match.nodes.query.node.meta["example_value"].device
    value = fold(site.linear.rate.xreplace(swap), _Nodes(writer, values, heads, device))
    if not isinstance(value, fx.Node) or not isinstance(value.meta["example_value"], torch.Tensor):
        return writer.call(torch.full, (heads,), value, dtype=torch.float32, device=device)
    if value.meta["example_value"].dim() == 0:
        value = writer.method("expand", value, (heads,))
    return value


def _per_head(writer: Writer, node: fx.Node, load: expr.Load, heads: int) -> fx.Node:
    """The elements that a load reads, one per head, float32: [H], or 0-d if all heads read the same.

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
    """The algebra whose values are nodes: [H] float32, or 0-d if they do not depend on the head."""

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

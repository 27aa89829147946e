"""The anchor ``flex_attention``. Its score_mod and mask_mod are graphs and are read like any other.

    out = softmax over k of score_mod(scale * q.k, b, h, q, k) where mask_mod(b, h, q, k), times v; 0 without keys
    lse = log2 of the sum of exp of the same scores

Captured tensors are read in the outer graph, so that the code that computes them is read too.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import Where, b, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import Operand, depth, row, trace
from effattn.passes.candidate.record import Candidate, MatchedNodes, Refused, require_fixed
from effattn.passes.candidate.space import Readers, score_space
from effattn.passes.graph.provenance import user_name
from effattn.passes.graph.sizes import is_broadcast
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.anchors.anchor import Anchor, called
from effattn.passes.match.block_mask import BlockMask
from effattn.passes.symbolic import Reader, Reading
from effattn.passes.symbolic.reader import Kind


def from_flex(view: GraphView, call: Call, readers: Readers) -> Candidate:
    """The candidate of a ``flex_attention`` node.

    Raises:
        Refused: a mod cannot be read, an output is used that the op does not compute, or the block lists of the mask
            hide keys that mask_mod allows.
    """
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    out, lse = _outputs(call)
    q_shape, k_shape, v_shape = (view.shape(node) for node in (query, key, value))
    batch, heads, q_len, head_dim = q_shape
    kv_heads, k_len = k_shape[1], k_shape[2]
    require_fixed(heads, kv_heads, v_shape[1], head_dim)
    space = score_space(view, readers, (batch, heads, q_len, k_len), leading=((b, h), batch, heads))
    reader, time = space.reader, view.time[call.node]

    def operand(node: fx.Node, shape: tuple, name: str) -> Operand:
        shared = is_broadcast(view, shape[0], batch)
        if shared is None:
            raise Refused(Why.BATCH, f"whether {name}'s batch of {shape[0]} is 1 or the query's {batch} is not known")
        at_batch = sympy.Integer(0) if shared else b
        at_head = h if shape[1] == heads else expr.FloorDiv(h, heads / kv_heads)
        bounds = Reader(view, {b: batch, h: heads, row: shape[2], depth: shape[3]})
        found = trace(view, bounds, node, (at_batch, at_head, row, depth), time)
        if found is None:
            raise Refused(Why.OPERANDS, f"the layout of {name} is not understood: {user_name(node)}")
        return found

    operands = [operand(query, q_shape, "query"), operand(key, k_shape, "key"), operand(value, v_shape, "value")]
    if operands[2].factor != 1:
        raise Refused(Why.VALUE, "value is scaled by a constant on the way to attention")
    scale = reader.read(call.get("scale"), time).at(())
    raw = scale * operands[0].factor * operands[1].factor * s
    mask = BlockMask.of(call)
    index = [_element("int", symbol) for symbol in (b, h, q, k)]
    captured = [_captured(reader, node, time) for node in call.get("mask_mod_other_buffers", ())]
    allowed = _read_mod(view, reader, mask.mask_mod, [*index, *captured], "mask_mod").bool_at(())
    captured = [_captured(reader, node, time) for node in call.get("score_mod_other_buffers", ())]
    given = [_element("float", raw), *index, *captured]
    term = _read_mod(view, reader, call.get("score_mod"), given, "score_mod").number_at(())
    allowed = mask.restrict(view, allowed, reader, time)
    return Candidate(
        MatchedNodes(call.node, out, *operands, before=call.node, lse=lse),
        found_as="flex_attention",
        space=space,
        term=Where(allowed, term, -sympy.oo),
        out_index=(b, h, q, depth),
        autocast=view.held(out).dtype != view.held(query).dtype,  # autocast casts query, key and value alike
    )


def _outputs(call: Call) -> tuple[fx.Node, fx.Node | None]:
    """The nodes of the output and, if it is used, of the LSE."""
    taken: dict[int, fx.Node] = {}
    for user in call.node.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int) or user.args[1] in taken:
            raise Refused(Why.OUTPUT, f"the outputs are not read by constant index: {user.name}")
        if user.users:
            taken[user.args[1]] = user
    if 0 not in taken:
        raise Refused(Why.OUTPUT, "the output is not used")
    if 2 in taken:
        raise Refused(Why.OUTPUT, "the largest score of each row is used (return_aux max_scores)", "omit it")
    if 1 in taken and (call.get("kernel_options") or {}).get("BACKEND") == "FLASH":
        raise Refused(Why.OUTPUT, "the LSE of the FLASH backend is used")
    return taken[0], taken.get(1)


def _element(kind: Kind, term: Any) -> Reading:
    return Reading((), kind, lambda _: term)


def _captured(reader: Reader, value: Any, time: int) -> Reading | Any:
    """A captured tensor as a reading in the outer graph; a number as it is."""
    return reader.read(value, time) if reader.view.tensor(value) is not None else value


def _read_mod(view: GraphView, outer: Reader, mod: fx.Node, given: list, name: str) -> Reading:
    """The reading of a mod's result. ``given``: readings of its tensor inputs in order, and numbers.

    Raises:
        Refused: it contains an operation that cannot be read; the reason names it.
    """
    body = view.graph.owning_module.get_submodule(str(mod.target))  # type: ignore[union-attr]
    if not isinstance(body, fx.GraphModule):
        raise Refused(Why.MOD, f"{name} is not a graph")
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(given):
        raise Refused(Why.MOD, f"{name} takes {len(inputs)} inputs, and {len(given)} are known")
    inside = GraphView(body.graph)
    reader = _ModReader(inside, outer, dict(zip(inputs, given, strict=True)))
    (end,) = (node for node in body.graph.nodes if node.op == "output")
    result = end.args[0]
    if isinstance(result, (tuple, list)) and len(result) == 1:
        (result,) = result
    value = inside.tensor(result)
    if value is None or value.dim() != 0:
        raise Refused(Why.MOD, f"{name} does not return one element")
    found = reader.read(result, inside.time[end])
    found.at(())
    for node in [source.node for source in reader.captures.values()] + list(reader.numbers.values()):
        spelled = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise Refused(Why.MOD, f"{spelled} in {name}: {reader.reasons.get(node, 'no symbolic meaning')}")
    return found


class _ModReader(Reader):
    """Reads the body of a mod, with readings for its inputs."""

    everything = True

    def __init__(self, inside: GraphView, outer: Reader, given: dict[fx.Node, Any]):
        super().__init__(inside, outer.sizes)
        self._outer = outer
        names = {call.name for node in inside.graph.nodes if (call := inside.call(node)) is not None}
        self._casts = not names.isdisjoint(("to", "type_as", "cast_int32"))
        self._definitions.update({node: value for node, value in given.items() if isinstance(value, Reading)})

    def dtype_of_capture(self, name: str) -> torch.dtype | None:
        return super().dtype_of_capture(name) or self._outer.dtype_of_capture(name)

    def computes_in(self, dtype: torch.dtype, *values: Any) -> torch.dtype:
        """Positions are int32 in the graph of a mod, but int64 where PyTorch runs the mod in eager mode."""
        if dtype != torch.int32 or self._casts:
            return dtype
        outside = (value.xreplace(dict.fromkeys(expr.loads_of(value), sympy.Integer(0))) for value in values)
        return torch.int64 if any(value.has(*expr.INDICES) for value in outside) else dtype


FLEX = Anchor("flex_attention", called("flex_attention"), (from_flex,))

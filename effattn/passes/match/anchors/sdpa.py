"""From an SDPA call to a candidate, with mask and operands read as expressions."""

from __future__ import annotations

import math

import sympy
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import Where, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import Operand, depth, row
from effattn.passes.candidate.record import FOUND_AS, Candidate, Dropout, MatchedNodes, Refused, require_fixed
from effattn.passes.candidate.space import Readers, score_space
from effattn.passes.graph.sizes import equal
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.anchors.anchor import Anchor, called
from effattn.passes.match.roles import folded_alike, notes_of_folding, traced
from effattn.passes.symbolic.pointwise import aligned


def from_sdpa(view: GraphView, call: Call, readers: Readers) -> Candidate:
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    if any(not isinstance(node, fx.Node) or view.tensor(node) is None for node in (query, key, value)):
        raise Refused(Why.ARGUMENTS, "query, key or value is not a tensor of the graph")
    q_shape, k_shape, v_shape = (view.shape(node) for node in (query, key, value))
    space = score_space(view, readers, (*q_shape[:-1], k_shape[-2]))
    index, reader, time = space.index[:-2], space.reader, view.time[call.node]
    head_dim = q_shape[-1]
    require_fixed(space.heads, head_dim)

    def operand(node: fx.Node, shape: tuple, name: str, length, whole: bool) -> Operand:
        if len(shape) != len(q_shape):
            raise Refused(Why.SHAPES, f"{name} has {len(shape)} dimensions where query has {len(q_shape)}")
        inside = list(index)
        for dim, (size, full) in enumerate(zip(shape[:-2], q_shape[:-2], strict=True)):
            if equal(view, size, full):
                continue
            if size == 1:
                inside[dim] = sympy.Integer(0)
            elif call.get("enable_gqa") and dim == len(shape) - 3 and (full / size).is_Integer and inside[dim] == h:
                inside[dim] = expr.FloorDiv(h, full / size)
            else:
                raise Refused(Why.SHAPES, f"{name} of shape {shape} does not fit query of shape {q_shape}")
        sizes = (space.batch, space.heads, length, shape[-1])
        return traced(view, node, (*inside, row, depth), time, name, sizes, whole=whole)

    scale = call.get("scale")
    factor = sympy.Float(1 / math.sqrt(int(head_dim))) if scale is None else reader.read(scale, time).at(())
    q_len, k_len = space.q_len, space.k_len
    given = ((query, q_shape, "query", q_len), (key, k_shape, "key", k_len), (value, v_shape, "value", k_len))
    operands = folded_alike(view, lambda whole: tuple(operand(*one, whole) for one in given))
    term = factor * operands[0].factor * operands[1].factor * s
    mask = call.get("attn_mask")
    if mask is not None:
        reading = reader.argument(call, "attn_mask")
        if len(reading.shape) > len(q_shape):
            raise Refused(Why.SHAPES, f"the mask has {len(reading.shape)} dimensions where query has {len(q_shape)}")
        at = reading.at(aligned(reading, space.index, (*q_shape[:-1], k_len)))
        term = Where(at, term, -sympy.oo) if reading.kind == "bool" else term + reader.grouped(at)
    if call.get("is_causal") is True:
        term = Where(k <= q, term, -sympy.oo)
    elif call.get("is_causal", False) is not False:
        raise Refused(Why.ARGUMENTS, "is_causal is not a constant")
    p = call.get("dropout_p", 0.0)
    dropout = Dropout.read(call.node, p, space.index) if isinstance(p, fx.Node) or p != 0 else None
    return Candidate(
        MatchedNodes(call.node, call.node, *operands, sdpa=call.args, dropout=dropout),
        found_as=call.node.meta.get(FOUND_AS, "sdpa"),
        space=space,
        term=term,
        out_index=(*index, q, depth),
        notes=notes_of_folding(operands),
    )


SDPA = Anchor("SDPA", called("sdpa"), (from_sdpa,))

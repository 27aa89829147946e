"""From an SDPA call to a draft: its arguments say all, masks and operands are read as expressions."""

from __future__ import annotations

import math

import sympy
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import Where, h, k, q, s
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import Operand, depth, row
from effattn.passes.candidate.record import FOUND_AS, Draft, Refused, require_fixed
from effattn.passes.graph.sizes import equal
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.products import (
    batch_index,
    folded_alike,
    note_folding,
    reader_for,
    traced,
)
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.pointwise import aligned


def from_sdpa(view: GraphView, call: Call, readers: dict[tuple, Reader]) -> Draft:
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    if any(not isinstance(node, fx.Node) or view.tensor(node) is None for node in (query, key, value)):
        raise Refused(Why.ARGUMENTS, "query, key or value is not a tensor of the graph")
    if call.get("dropout_p", 0.0) != 0.0:
        raise Refused(
            Why.DROPOUT, f"attention dropout p={call.get('dropout_p')} is live", "call model.eval(), or set it to 0"
        )
    q_shape, k_shape, v_shape = (view.shape(node) for node in (query, key, value))
    index, batch, heads = batch_index(q_shape[:-2])
    q_len, k_len, head_dim, value_dim = q_shape[-2], k_shape[-2], q_shape[-1], v_shape[-1]
    require_fixed(heads, head_dim)
    reader = reader_for(view, readers, False, batch, heads, q_len, k_len)
    time = view.time[call.node]

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
        return traced(view, node, (*inside, row, depth), time, name, (batch, heads, length, shape[-1]), whole=whole)

    scale = call.get("scale")
    factor = sympy.Float(1 / math.sqrt(int(head_dim))) if scale is None else reader.read(scale, time).at(())
    given = ((query, q_shape, "query", q_len), (key, k_shape, "key", k_len), (value, v_shape, "value", k_len))
    operands = folded_alike(view, lambda whole: tuple(operand(*one, whole) for one in given))
    term = factor * operands[0].factor * operands[1].factor * s
    notes: list[str] = []
    mask = call.get("attn_mask")
    if mask is not None:
        reading = reader.argument(call, "attn_mask")
        if len(reading.shape) > len(q_shape):
            raise Refused(Why.SHAPES, f"the mask has {len(reading.shape)} dimensions where query has {len(q_shape)}")
        at = reading.at(aligned(reading, (*index, q, k), (*q_shape[:-1], k_len)))
        term = Where(at, term, -sympy.oo) if reading.kind == "bool" else term + reader.grouped(at)
    if call.get("is_causal") is True:
        term = Where(k <= q, term, -sympy.oo)
    elif call.get("is_causal", False) is not False:
        raise Refused(Why.ARGUMENTS, "is_causal is not a constant")
    note_folding(operands, notes)
    return Draft(
        anchor=call.node,
        replaced=call.node,
        found_as=call.node.meta.get(FOUND_AS, "sdpa"),
        query=operands[0],
        key=operands[1],
        value=operands[2],
        batch=batch,
        heads=heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=value_dim,
        term=term,
        scores_index=(*index, q, k),
        out_index=(*index, q, depth),
        reader=reader,
        zero_when_empty=True,
        is_plain_sdpa=mask is None,
        sdpa=call.args,
        notes=notes,
    )

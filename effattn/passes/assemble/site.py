"""Makes a site from a candidate: checks it, separates score and mask, and names captured tensors and numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.linear import LinearSpec
from effattn.ir.refusal import Why
from effattn.ir.site import Layout, Site, Stage
from effattn.passes.assemble.admissible import check_gradients, check_operands, check_recorded
from effattn.passes.assemble.meaning import meaning
from effattn.passes.candidate.naming import capture_names, capture_spec, number_names, own_names, renamed, scalars_of
from effattn.passes.candidate.placement import Placement, placement
from effattn.passes.candidate.record import Candidate, Match, MatchedNodes, Refused, require_fixed
from effattn.passes.graph.owner import classes_around, layer_around
from effattn.passes.graph.provenance import layer_of, location, module_path
from effattn.passes.graph.view import GraphView, as_sympy, hint


def assemble(view: GraphView, candidate: Candidate) -> Match:
    """The match of a candidate; its site is named after its module.

    Raises:
        Refused: no op computes the candidate; the reason says why.
    """
    check_recorded(view, candidate)
    layout = _layout(view, candidate)
    candidate = _with_operands_expanded(candidate)
    nodes, reader, end = candidate.nodes, candidate.space.reader, view.time[candidate.nodes.replaced]
    check_operands(view, candidate, layout)
    read = meaning(view, candidate, layout)
    score, predicate, position = read.score, read.predicate, read.position
    check_gradients(view, candidate)
    names = capture_names(score, predicate, reader.captures)
    numbers = number_names(score, predicate)
    score, predicate, position = (renamed(term, names, numbers) for term in (score, predicate, position))
    sources = {names[old]: source for old, source in reader.captures.items() if old in names}
    used = list(dict.fromkeys(load.name for load in expr.loads_of(score, predicate)))
    captures = tuple(sources[name] for name in used)
    device = view.held(nodes.query.node).device
    for name, source in zip(used, captures, strict=True):  # PyTorch accepts 0-d CPU tensors here, a kernel cannot
        if getattr(view.tensor(source.node), "device", None) != device:
            raise Refused(Why.DEVICE, f"{name} ({source.node.name}) is on another device than the query")
    scalars = scalars_of(view, end, score, predicate)
    if unknown := set(numbers) - set(reader.numbers):
        raise Refused(Why.SYMBOLIC_NUMBER, f"no node of the graph holds {', '.join(sorted(unknown))}")
    place = placement(candidate.out_index, layout.heads, layout.q_len, layout.value_dim)
    if place is None:
        reason = f"the order of the output's dimensions is not understood: {candidate.out_index}"
        raise Refused(Why.OUTPUT_LAYOUT, reason)
    flows = view.gradient_flows(end)
    given = [*(operand.node for operand in nodes.operands.values()), *(source.node for source in captures)]
    given += [nodes.loop.initial] if nodes.loop is not None and nodes.loop.initial is not None else []
    needs_grad = flows and any(view.held(node).requires_grad for node in given)
    path, counted = module_path(nodes.anchor), layer_around(nodes.anchor)
    hints = Layout(*(_hint(view, size, nodes) for size in vars(layout).values()))
    site = Site(
        name=path or "attention",
        found_as=candidate.found_as,
        stage=_stage(hints, position, needs_grad, candidate.linear),
        layout=layout,
        hints=hints,
        spec=AttentionSpec(
            score=score,
            predicate=predicate,
            captures=tuple(capture_spec(view, name, source) for name, source in zip(used, captures, strict=True)),
            scalars=tuple(str(symbol) for symbol, _ in scalars),
            numbers=tuple(numbers.values()),
            empty_rows=read.empty_rows,
            dropout=0.0 if nodes.dropout is None else nodes.dropout.probability,
        ),
        position=position,
        dtype=str(view.held(nodes.replaced).dtype).removeprefix("torch."),
        device=device.type,
        needs_grad=needs_grad,
        output_layout=_output_layout(view, nodes, place),
        layer=layer_of(path) if counted is None else counted[0],
        layer_count=None if counted is None else counted[1],
        path=path,
        module_classes=classes_around(nodes.anchor),
        location=location(nodes.anchor),
        linear=None if read.linear is None else replace(read.linear, rate=renamed(read.linear.rate, names, numbers)),
        sink=nodes.sink is not None,
        reads=own_names(used, list(captures)),
        notes=candidate.notes + read.notes + _dropped(nodes),
    )
    return Match(
        site,
        nodes,
        candidate.space.index,
        place,
        captures,
        scalars=tuple(source for _, source in scalars),
        numbers=tuple(reader.numbers[name] for name in numbers),
        threshold=read.threshold,
    )


def _dropped(nodes: MatchedNodes) -> tuple[str, ...]:
    return () if nodes.dropout is None else (f"dropout of the weights, p={nodes.dropout.probability:g}",)


def _layout(view: GraphView, candidate: Candidate) -> Layout:
    space, nodes = candidate.space, candidate.nodes
    widths = nodes.query.width_in(view), nodes.value.width_in(view)
    require_fixed(space.heads, *widths)
    return Layout(space.batch, space.heads, nodes.key.heads_in(view), space.q_len, space.k_len, *widths)


def _with_operands_expanded(candidate: Candidate) -> Candidate:
    """Expand (a view) a query, key or value shared by the batch, and a query shared by all heads (learned queries)."""
    operands, full, heads = candidate.nodes.operands, candidate.space.batch, candidate.space.heads
    shared = {name: operand for name, operand in operands.items() if operand.dims[0] is None}
    if full != 1 and shared:
        if len(shared) == len(operands):
            raise Refused(Why.BATCH, f"query, key and value are shared by the batch of {full}")
        alone = [one for name, one in operands.items() if name not in shared and not one.apart]
        if not full.is_Integer and not alone:
            raise Refused(Why.BATCH, "no dimension of query, key and value holds the batch alone")
        batch: Any = int(full) if full.is_Integer else (alone[0].node, alone[0].dims[0])
        operands |= {name: replace(operand, batch=batch) for name, operand in shared.items()}
    if heads != 1 and not operands["query"].dims[1]:
        operands["query"] = replace(operands["query"], heads=int(heads))
    nodes = replace(candidate.nodes, query=operands["query"], key=operands["key"], value=operands["value"])
    return replace(candidate, nodes=nodes)


def _output_layout(view: GraphView, nodes: MatchedNodes, place: Placement) -> str:
    """The memory order of the output: "bnhd" if the replaced node had it, or if its users transpose to it."""
    tensor = view.held(nodes.replaced)
    if tensor.dim() == 4 and place.is_identity:
        if (anchor := view.call(nodes.anchor)) is not None and anchor.name != "softmax":
            heads, rows = tensor.stride()[1:3]
            return "bnhd" if hint(heads) < hint(rows) else "bhnd"
        calls = [view.call(user) for user in nodes.replaced.users]
        if calls and all(call is not None and call.name in ("transpose", "permute") for call in calls):
            return "bnhd"
    return "bhnd"


def _stage(hints: Layout, position, needs_grad: bool, linear: LinearSpec | None) -> Stage:
    if needs_grad:
        return "train"
    if (hints.q_len == 1 and hints.k_len > 1) or (linear is not None and linear.state == "stepped"):
        return "decode"
    if position is not None:
        return "prefill"
    return "cross" if hints.q_len != hints.k_len else "encoder"


def _hint(view: GraphView, size, nodes: MatchedNodes) -> int:
    size = sympy.sympify(size)
    if size.is_Integer:
        return int(size)
    for operand in nodes.operands.values():
        for extent in view.held(operand.node).shape:
            if isinstance(extent, torch.SymInt) and as_sympy(extent) == size:
                return hint(extent)
    return 0

"""From a draft to a site: checked, read, named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec
from effattn.ir.refusal import Why
from effattn.ir.site import Layout, Site, Stage
from effattn.passes.assemble.admissible import check_gradients, check_operands, check_recorded
from effattn.passes.assemble.meaning import meaning
from effattn.passes.candidate.naming import capture_names, capture_spec, number_names, own_names, renamed, scalars_of
from effattn.passes.candidate.placement import placement
from effattn.passes.candidate.record import Anchors, Draft, Match, Refused, require_fixed
from effattn.passes.graph.owner import classes_around, layer_around
from effattn.passes.graph.provenance import layer_of, location, module_path
from effattn.passes.graph.view import GraphView, as_sympy, hint


def assemble(view: GraphView, draft: Draft, order: int) -> Match:
    """The finished match.

    Raises:
        Refused: the draft cannot be computed by an op; the reason says why.
    """
    check_recorded(view, draft)
    require_fixed(draft.heads, draft.head_dim, draft.value_dim)
    layout = Layout(
        draft.batch, draft.heads, draft.key.heads_in(view), draft.q_len, draft.k_len, draft.head_dim, draft.value_dim
    )
    _expand_shared(view, draft)
    check_operands(view, draft, layout)
    read = meaning(view, draft, layout)
    score, predicate, position, empty = read.score, read.predicate, read.position, read.empty_rows
    check_gradients(view, draft)
    names = capture_names(score, predicate, draft.reader.captures)
    numbers = number_names(score, predicate)
    score, predicate, position = (renamed(term, names, numbers) for term in (score, predicate, position))
    sources = {names[old]: source for old, source in draft.reader.captures.items() if old in names}
    used = list(dict.fromkeys(load.name for load in expr.loads_of(score, predicate)))
    specs = tuple(capture_spec(view, name, sources[name]) for name in used)
    devices = {name: getattr(view.tensor(sources[name].node), "device", None) for name in used}
    for name, device in devices.items():  # a 0-d tensor may stand on the CPU: PyTorch takes it there, a kernel cannot
        if device != getattr(view.tensor(draft.query.node), "device", None):
            raise Refused(Why.DEVICE, f"{name} ({sources[name].node.name}) is on another device than the query")
    scalars = scalars_of(view, draft, score, predicate)
    if unknown := set(numbers) - set(draft.reader.numbers):
        raise Refused(Why.SYMBOLIC_NUMBER, f"no node of the graph holds {', '.join(sorted(unknown))}")
    place = placement(draft.out_index, layout.heads, layout.q_len, layout.value_dim)
    if place is None:
        raise Refused(Why.OUTPUT_LAYOUT, f"the order of the output's dimensions is not understood: {draft.out_index}")

    path = module_path(draft.anchor)
    counted = layer_around(draft.anchor)
    tensor = view.tensor(draft.query.node)
    assert tensor is not None
    flows = view.gradient_flows(view.time[draft.replaced])
    captures_need_grad = flows and any(view.held(sources[name].node).requires_grad for name in used)
    needs_grad = flows and (
        captures_need_grad
        or any(view.held(operand.node).requires_grad for operand in (draft.query, draft.key, draft.value))
    )
    spec = AttentionSpec(
        score=score,
        predicate=predicate,
        captures=specs,
        scalars=tuple(str(symbol) for symbol, _ in scalars),
        numbers=tuple(numbers.values()),
        empty_rows=empty,
    )
    hints = Layout(*(_hint(view, size, draft) for size in vars(layout).values()))
    site = Site(
        name=f"{path or 'attention'}#{order}",
        found_as=draft.found_as,
        stage=_stage(hints, position, needs_grad),
        layout=layout,
        hints=hints,
        spec=spec,
        position=position,
        dtype=_dtype(view, draft),
        device=tensor.device.type,
        needs_grad=needs_grad,
        captures_need_grad=captures_need_grad,
        output_layout=_output_layout(view, draft, place),
        layer=layer_of(path) if counted is None else counted[0],
        layer_count=None if counted is None else counted[1],
        path=path,
        module_classes=classes_around(draft.anchor),
        location=location(draft.anchor),
        sink=draft.sink is not None,
        reads=own_names(used, [sources[name] for name in used]),
        notes=tuple(draft.notes),
    )
    anchors = Anchors(
        replaced=draft.replaced,
        anchor=draft.anchor.name,
        scores=draft.scores,
        scores_index=draft.scores_index,
        query=draft.query,
        key=draft.key,
        value=draft.value,
        placement=place,
        captures=tuple(sources[name] for name in used),
        scalars=tuple(source for _, source in scalars),
        numbers=tuple(draft.reader.numbers[name] for name in numbers),
        threshold=read.threshold,
        is_plain_sdpa=draft.is_plain_sdpa,
        sdpa=draft.sdpa,
        before=draft.before,
        lse=draft.lse,
        sink=draft.sink,
    )
    return Match(site, anchors)


def _expand_shared(view: GraphView, draft: Draft) -> None:
    """Where all batches share a query, key or value, or all heads a query (learned queries), it is expanded: a view."""
    operands = {name: getattr(draft, name) for name in ("query", "key", "value")}
    batch: Any = int(draft.batch) if draft.batch.is_Integer else None
    for operand in operands.values():
        if batch is None and operand.dims[0] is not None and not operand.apart:
            batch = (operand.node, operand.dims[0])
    if draft.batch != 1:
        if all(operand.dims[0] is None for operand in operands.values()):
            raise Refused(Why.BATCH, f"query, key and value are shared by the batch of {draft.batch}")
        shared = {name: operand for name, operand in operands.items() if operand.dims[0] is None}
        if shared and batch is None:
            raise Refused(Why.BATCH, "no dimension of query, key and value holds the batch alone")
        for name, operand in shared.items():
            setattr(draft, name, replace(operand, batch=batch))
    if draft.heads != 1 and not draft.query.dims[1]:
        draft.query = replace(draft.query, heads=int(draft.heads))


def _dtype(view: GraphView, draft: Draft) -> str:
    return str(view.held(draft.replaced).dtype).removeprefix("torch.")


def _output_layout(view: GraphView, draft: Draft, place) -> str:
    """Memory order to write: heads inside rows if that is what the replaced node had, or what its users undo."""
    tensor = view.held(draft.replaced)
    if tensor.dim() == 4 and place.is_identity:
        if (anchor := view.call(draft.anchor)) is not None and anchor.name != "softmax":
            heads, rows = tensor.stride()[1:3]
            return "bnhd" if hint(heads) < hint(rows) else "bhnd"
        calls = [view.call(user) for user in draft.replaced.users]
        if calls and all(call is not None and call.name in ("transpose", "permute") for call in calls):
            return "bnhd"
    return "bhnd"


def _stage(hints: Layout, position, needs_grad: bool) -> Stage:
    if needs_grad:
        return "train"
    if hints.q_len == 1 and hints.k_len > 1:
        return "decode"
    if position is not None:
        return "prefill"
    return "cross" if hints.q_len != hints.k_len else "encoder"


def _hint(view: GraphView, size, draft: Draft) -> int:
    size = sympy.sympify(size)
    if size.is_Integer:
        return int(size)
    for operand in (draft.query, draft.key, draft.value):
        for extent in view.held(operand.node).shape:
            if isinstance(extent, torch.SymInt) and as_sympy(extent) == size:
                return hint(extent)
    return 0

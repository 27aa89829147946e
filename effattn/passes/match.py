"""Find attention: from each softmax or SDPA call outward by data flow.

No template is compared. From a softmax the scores are read symbolically down to one product of query and key, and
the weights are followed through views and casts to their product with value. What stands between does not matter as
long as it can be read; what cannot be read is left alone, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import Where, b, h, k, q, s
from effattn.ir.site import Refusal
from effattn.passes.assemble import assemble
from effattn.passes.contraction import Contraction, contraction
from effattn.passes.draft import FOUND_AS, NOT_ATTENTION, Draft, Match, Missed, Refused, require_fixed
from effattn.passes.flex import from_flex
from effattn.passes.graph import GraphView, bodies_of
from effattn.passes.operands import Operand, depth, heads_beside_batch, only_new_dims, row
from effattn.passes.products import (
    adds_nothing,
    batch_index,
    note_folding,
    operand_index,
    query_key_product,
    reader_for,
    scores_at,
    sides,
    spelled,
    traced,
    value_of,
)
from effattn.passes.provenance import location, module_path
from effattn.passes.reading import LoadSource, Reader
from effattn.passes.reading.elementwise import aligned, is_dead_dropout
from effattn.passes.reading.reader import Unreadable
from effattn.passes.reading.views import permutation, reinterprets, reshape_index
from effattn.passes.sink_column import Scores, drops_the_sink, require_plain, scores_of
from effattn.passes.softmax_by_hand import may_hold_written_softmax, written_softmax
from effattn.passes.vocabulary import Call


def find(view: GraphView) -> tuple[list[Match], list[Missed]]:
    """Every attention of the graph, in order, and every softmax that is not one or is left alone."""
    readers: dict[tuple, Reader] = {}
    matches: list[Match] = []
    missed: list[Missed] = []
    for call in _anchors(view):
        found = _match(view, call, readers, len(matches))
        if isinstance(found, Match):
            matches.append(found)
        elif view.call(call.node) == call or found.rule != NOT_ATTENTION:  # any quotient may look like a softmax
            missed.append(Missed(module_path(call.node)[0] or call.node.name, location(call.node), found))
    missed += [_inside(node) for node in view.graph.nodes if _hides_attention(node)]
    return matches, missed + [_as_operator(node) for node in view.graph.nodes if _is_operator(node)]


def _match(view: GraphView, call: Call, readers: dict[tuple, Reader], order: int) -> Match | Refusal:
    """The first reading of an anchor that makes a site, or why the first that applies does not."""
    refusals: list[Refusal] = []
    for draft in _DRAFTS[call.name]:
        try:
            return assemble(view, draft(view, call, readers), order)
        except Refused as refused:
            refusals.append(refused.refusal)
        except Unreadable as unreadable:
            refusals.append(Refused("reading", str(unreadable)).refusal)
    refusal = next((refusal for refusal in refusals if refusal.rule != _NOT_APART), refusals[-1])
    if refusal.rule == "rows without keys" and call.name == "softmax":
        try:
            return assemble(view, _from_softmax(view, call, readers, mask_is_data=True), order)
        except (Refused, Unreadable):
            pass
    return refusal


def _hides_attention(node: fx.Node) -> bool:
    """Whether a higher-order operator has attention in the graphs that it runs."""
    if node.target is torch.ops.higher_order.flex_attention:
        return False
    return any(mentions_attention(body) for body in bodies_of(node))


def _inside(node: fx.Node) -> Missed:
    hint = "disable gradient checkpointing to have it replaced" if "checkpoint" in spelled(node) else ""
    reason = f"it is inside {spelled(node)}, and graphs within the graph are not looked into"
    return Missed(node.name, location(node), Refused("higher order", reason, hint).refusal)


def _is_operator(node: fx.Node) -> bool:
    """Whether a node is a softmax or SDPA of ATen, as programs are made of that torch.export made."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    return "softmax" in node.target.__name__ or "scaled_dot_product" in node.target.__name__


def _as_operator(node: fx.Node) -> Missed:
    reason = f"it is the operator {node.target} of an exported program, and these are not read"
    return Missed(
        node.name, location(node), Refused("operator", reason, "compile the module that was exported").refusal
    )


def mentions_attention(graph: fx.Graph) -> bool:
    """A quick look for anything that could be attention, so that other graphs cost nothing."""
    names = ("softmax", "attention", "transformer_encoder_layer")
    return any(
        any(name in str(getattr(node.target, "__name__", node.target)) for name in names) or _hides_attention(node)
        for node in graph.nodes
        if node.op.startswith("call_")
    ) or may_hold_written_softmax(graph)


def _anchors(view: GraphView) -> Iterator[Call]:
    for node in view.graph.nodes:
        call = view.call(node)
        if call is not None and call.name in _DRAFTS:
            yield call
        elif call is not None and (softmax := written_softmax(view, call)) is not None:
            yield softmax


_NOT_APART = "heads apart"  # the rule that scores fail in which batch and heads are not one dimension


# -- SDPA ---------------------------------------------------------------------------------------------------------


def _from_sdpa(view: GraphView, call: Call, readers: dict[tuple, Reader]) -> Draft:
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    if any(not isinstance(node, fx.Node) or view.tensor(node) is None for node in (query, key, value)):
        raise Refused("arguments", "query, key or value is not a tensor of the graph")
    if call.get("dropout_p", 0.0) != 0.0:
        raise Refused(
            "dropout", f"attention dropout p={call.get('dropout_p')} is live", "call model.eval(), or set it to 0"
        )
    q_shape, k_shape, v_shape = (view.shape(node) for node in (query, key, value))
    index, batch, heads = batch_index(q_shape[:-2])
    q_len, k_len, head_dim, value_dim = q_shape[-2], k_shape[-2], q_shape[-1], v_shape[-1]
    require_fixed(heads, head_dim)
    reader = reader_for(view, readers, False, batch, heads, q_len, k_len)
    time = view.time[call.node]

    def operand(node: fx.Node, shape: tuple, name: str, length, whole: bool) -> Operand:
        if len(shape) != len(q_shape):
            raise Refused("shapes", f"{name} has {len(shape)} dimensions where query has {len(q_shape)}")
        inside = list(index)
        for dim, (size, full) in enumerate(zip(shape[:-2], q_shape[:-2], strict=True)):
            if size == full:
                continue
            if size == 1:
                inside[dim] = sympy.Integer(0)
            elif call.get("enable_gqa") and dim == len(shape) - 3 and (full / size).is_Integer and inside[dim] == h:
                inside[dim] = expr.FloorDiv(h, full / size)
            else:
                raise Refused("shapes", f"{name} of shape {shape} does not fit query of shape {q_shape}")
        return traced(view, node, (*inside, row, depth), time, name, (batch, heads, length, shape[-1]), whole=whole)

    scale = call.get("scale")
    factor = sympy.Float(1 / math.sqrt(int(head_dim))) if scale is None else reader.read(scale, time).at(())
    given = ((query, q_shape, "query", q_len), (key, k_shape, "key", k_len), (value, v_shape, "value", k_len))
    for whole in (False, True):  # heads are folded back if they can be in both key and value
        operands = [operand(*one, whole) for one in given]
        if operands[1].heads_in(view) == operands[2].heads_in(view):
            break
    term = factor * operands[0].factor * operands[1].factor * s
    notes: list[str] = []
    mask = call.get("attn_mask")
    if mask is not None:
        reading = reader.argument(call, "attn_mask")
        if len(reading.shape) > len(q_shape):
            raise Refused("shapes", f"the mask has {len(reading.shape)} dimensions where query has {len(q_shape)}")
        at = reading.at(aligned(reading, (*index, q, k), (*q_shape[:-1], k_len)))
        term = Where(at, term, -sympy.oo) if reading.kind == "bool" else term + reader.grouped(at)
    if call.get("is_causal") is True:
        term = Where(k <= q, term, -sympy.oo)
    elif call.get("is_causal", False) is not False:
        raise Refused("arguments", "is_causal is not a constant")
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
        is_sdpa=True,
        notes=notes,
    )


# -- softmax ------------------------------------------------------------------------------------------------------


def _with_heads_apart(view: GraphView, call: Call, readers: dict[tuple, Reader]) -> Draft:
    """A softmax over scores [B * H, Nq, Nk], batch and heads told apart by what query or key were before.

    Raises: Refused: also where the scores have another shape, or nothing tells them apart.
    """
    return _from_softmax(view, call, readers, apart=True)


def _from_softmax(
    view: GraphView, call: Call, readers: dict[tuple, Reader], apart: bool = False, mask_is_data: bool = False
) -> Draft:
    """``apart``: batch and heads are one dimension. ``mask_is_data``: what is added last is not looked into."""
    scores = call.get("input")
    if not isinstance(scores, fx.Node) or view.tensor(scores) is None or not isinstance(call.get("dim"), int):
        raise Refused("arguments", "softmax without a constant dim over a tensor")
    shape, time = view.shape(scores), view.time[call.node]
    dim = call.get("dim") % len(shape)
    found = scores_of(view, call, dim)
    scores, shape, time = found.node, view.shape(found.node), found.time
    if apart and len(shape) != 3:
        raise Refused(_NOT_APART, "batch and heads are not one dimension")
    product, q_dim = query_key_product(view, readers, scores, shape, dim, time)
    rest = [n for n in range(len(shape)) if n not in (dim, q_dim)]
    if apart:
        heads = _heads_beside_batch(view, readers, found, (dim, q_dim), product)
        batch = sympy.cancel(shape[rest[0]] / heads)
        leading = (h if batch == 1 else b * heads + h,)
    else:
        leading, batch, heads = batch_index(tuple(shape[n] for n in rest))
    index: list[Any] = [None] * len(shape)
    for n, entry in zip(rest, leading, strict=True):
        index[n] = entry
    index[q_dim], index[dim] = q, k
    q_len, k_len = shape[q_dim], shape[dim]
    reader = reader_for(view, readers, True, batch, heads, q_len, k_len)
    term, inside = scores_at(view, reader, scores, tuple(index), time, product, mask_is_data)

    roles = sides(product, inside)
    if roles is None:
        raise Refused("product", "query and key cannot be told apart in the product before softmax")
    if found.sink is not None:
        require_plain(tuple(index), (b, h, q, k))
    weights = _follow_weights(view, call.node, tuple(index), reader, found.sink is not None)
    replaced, value_product, placed, zeroed = weights
    head_dim, dtype = view.shape(product.left)[product.left_labels.index(product.summed)], view.held(replaced).dtype
    for whole in (False, True):  # heads are folded back if they can be in both key and value
        operands = []
        for name, side, length, free in (("query", roles[0], q_len, q), ("key", roles[1], k_len, k)):
            node, labels = product.operand(side)
            at = dict(zip(product.out_labels, inside, strict=True))
            entries = operand_index(view, node, labels, {**at, product.summed: depth}, {free: row})
            sizes = (batch, heads, length, head_dim)
            operands.append(traced(view, node, entries, view.time[product.node], name, sizes, dtype, whole))
        value, out_index, value_dim = value_of(view, value_product, placed, (batch, heads, k_len), whole)
        if operands[1].heads_in(view) == value.heads_in(view):
            break
    term = term.subs(s, operands[0].factor * operands[1].factor * s)
    notes: list[str] = []
    note_folding([*operands, value], notes)
    if view.held(product.node).dtype == view.held(replaced).dtype != view.held(product.left).dtype:
        notes.append("autocast")
    if found.sink is not None:
        notes.append("a sink takes part in the softmax: the result is multiplied by sigmoid(lse - sink)")
    return Draft(
        anchor=call.node,
        replaced=replaced,
        found_as=call.node.meta.get(FOUND_AS, "softmax"),
        query=operands[0],
        key=operands[1],
        value=value,
        batch=batch,
        heads=heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=head_dim,
        value_dim=value_dim,
        term=term,
        scores_index=tuple(index),
        out_index=out_index,
        reader=reader,
        zero_when_empty=False,
        nan_when_empty=view.call(call.node) != call and not found.shifted,
        scores=LoadSource(found.node, found.time),
        sink=found.sink,
        zeroed=zeroed,
        notes=notes,
    )


def _heads_beside_batch(
    view: GraphView, readers: dict, found: Scores, dims: tuple[int, int], product: Contraction
) -> Any:
    """How many heads the one leading dimension of the scores holds.

    Raises: Refused: no view of query or key tells.
    """
    shape, (dim, q_dim) = view.shape(found.node), dims
    (leading,) = (n for n in range(3) if n not in dims)
    index = [b, b, b]
    index[q_dim], index[dim] = q, k
    size, q_len, k_len = shape[leading], shape[q_dim], shape[dim]
    reader = reader_for(view, readers, True, size, sympy.Integer(1), q_len, k_len)
    _, inside = scores_at(view, reader, found.node, tuple(index), found.time, product)
    at = dict(zip(product.out_labels, inside, strict=True))
    bounds = Reader(view, {b: size, h: sympy.Integer(1), q: q_len, k: k_len})
    for side in ("left", "right"):
        node, labels = product.operand(side)
        entries = operand_index(view, node, labels, {**at, product.summed: depth}, {})
        heads = heads_beside_batch(view, bounds, node, entries, view.held(node).dtype)
        if heads is not None and sympy.cancel(size / heads).is_integer:
            return sympy.Integer(heads)
    raise Refused(_NOT_APART, "nothing tells batch and heads apart")


def _follow_weights(view: GraphView, softmax: fx.Node, index: tuple, reader: Reader, sink: bool):
    """From the softmax through casts and views to the product with value.

    Returns (its node, the product, the weights and their index, where they were set to zero on the way).
    ``sink``: the weights have a last column that has to be dropped on the way.
    """
    node = softmax
    zeroed: list[Any] = []
    while True:
        users = sorted(node.users, key=lambda user: view.time[user])
        if users and (call := _zeroing_in_place(view, reader, users[0], node)) is not None:
            zeroed.append(_mask_at(reader, call, index, view.shape(node)))
            users = [*users[0].users, *users[1:]]  # what was written to has two names from here on
            node = call.node if call.node.users else node
        if len(users) != 1:
            raise _used_elsewhere(view, users)
        user = users[0]
        product = contraction(view, user)
        if product is not None:
            if sink:
                raise Refused("sink", "the weights of the sink column are not dropped before the product with value")
            if (product.left is node) == (product.right is node):
                raise Refused("weights", "the weights are multiplied with themselves")
            if view.writes(user):
                raise Refused("output", f"{spelled(user)} writes its result into another tensor (out=)")
            if (call := view.call(user)) is not None and call.name == "baddbmm" and not adds_nothing(call):
                raise Refused("output", "baddbmm adds a tensor to the product of weights and value")
            return user, product, (node, index), tuple(zeroed)
        call = view.call(user)
        if call is None or view.writes(user):
            raise Refused("weights", f"{spelled(user)} stands between softmax and value")
        if view.cuts_gradient(user, view.time[user] + 1):
            raise Refused("gradient", f"{spelled(user)} stops the gradient between softmax and value")
        if sink and drops_the_sink(call, index.index(k) if k in index else -1, len(index)):
            node, sink = user, False
            continue
        if call.name == "dropout" and not is_dead_dropout(call):
            raise Refused(
                "dropout", f"attention dropout p={call.get('p')} is live", "call model.eval(), or set it to 0"
            )
        if call.name == "reshape" or (call.name == "getitem" and only_new_dims(call.get("index"))):
            # where an element of the view lies in the weights: read backwards
            moved = (
                None if reinterprets(view, call) else reshape_index(reader, view.shape(user), view.shape(node), index)
            )
            if moved is None:
                raise Refused("weights", f"the view {user.name} of the weights is not understood")
            index = moved
        elif (order := permutation(call, len(index))) is not None:
            index = tuple(index[old] for old in order)
        elif _fills_with_zeros(reader, call):
            zeroed.append(_mask_at(reader, call, index, view.shape(node)))
        elif call.name not in ("identity", "dropout", "to", "type_as") and not call.name.startswith("cast_"):
            raise Refused("weights", f"{spelled(user)} stands between softmax and value")
        elif not view.held(user).dtype.is_floating_point or view.held(user).dtype.itemsize < 2:
            raise Refused("weights", f"the weights are cast to {view.held(user).dtype}")
        node = user


def _used_elsewhere(view: GraphView, users: list[fx.Node]) -> Refused:
    """Who else uses the weights; if it is what comes after the graph, why the graph ends."""
    where = ", ".join(user.name for user in users) or "nobody"
    reason, hint = f"the attention weights are used elsewhere (by {where})", "ask the model not to return them"
    end = getattr(view.graph.owning_module, "compile_subgraph_reason", None)  # as Dynamo says it
    if end is not None and end.graph_break and any(user.op == "output" for user in users):
        reason += f"; the graph ends there because of a graph break: {end.reason.splitlines()[0]}"
        setting = "torch._dynamo.config.capture_scalar_outputs"
        hint = f"set {setting} = True" if setting in end.reason else "avoid the graph break"
    return Refused("weights", reason, hint)


def _fills_with_zeros(reader: Reader, call: Call) -> bool:
    return call.name == "masked_fill" and sympy.sympify(reader.argument(call, "value").at(())).is_zero is True


def _mask_at(reader: Reader, call: Call, index: tuple, shape: tuple) -> Any:
    mask = reader.argument(call, "mask")
    return mask.bool_at(aligned(mask, index, shape))


def _zeroing_in_place(view: GraphView, reader: Reader, user: fx.Node, weights: fx.Node) -> Call | None:
    """``weights.masked_fill_(mask, 0)``"""
    call = view.call(user)
    if call is None or view.written_as(user) is not weights or not _fills_with_zeros(reader, call):
        return None
    return None if view.cuts_gradient(user, view.time[user] + 1) else call


# by the anchor's name: what to try, in this order
_DRAFTS: dict[str, tuple[Callable[..., Draft], ...]] = {
    "sdpa": (_from_sdpa,),
    "softmax": (_with_heads_apart, _from_softmax),
    "flex_attention": (from_flex,),
}

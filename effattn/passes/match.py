"""Find attention: from each softmax or SDPA call outward by data flow.

No template is compared. From a softmax the scores are read symbolically down to one product of query and key, and
the weights are followed through views and casts to their product with value. What stands between does not matter as
long as it can be read; what cannot be read is left alone, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import Where, b, h, k, q, s
from effattn.passes.assemble import assemble, location, module_path
from effattn.passes.contraction import Contraction, contraction
from effattn.passes.draft import FOUND_AS, NOT_ATTENTION, Draft, Match, Missed, Refused, require_fixed
from effattn.passes.flex import from_flex
from effattn.passes.graph import GraphView, bodies_of
from effattn.passes.operands import Operand, depth, row, trace
from effattn.passes.reading import Reader
from effattn.passes.reading.elementwise import aligned, is_dead_dropout
from effattn.passes.reading.reader import Unreadable
from effattn.passes.reading.views import permutation, reinterprets, reshape_index
from effattn.passes.vocabulary import Call

NO_PRODUCT = "the scores do not come from a product of two tensors: not attention"


def find(view: GraphView) -> tuple[list[Match], list[Missed]]:
    """Every attention of the graph, in order, and every softmax that is not one or is left alone."""
    readers: dict[tuple, Reader] = {}
    matches: list[Match] = []
    missed: list[Missed] = []
    for call in _anchors(view):
        try:
            matches.append(assemble(view, _DRAFTS[call.name](view, call, readers), len(matches)))
        except Refused as refused:
            name = module_path(call.node)[0] or call.node.name
            missed.append(Missed(name, location(call.node), refused.refusal))
        except Unreadable as unreadable:
            name = module_path(call.node)[0] or call.node.name
            missed.append(Missed(name, location(call.node), Refused("reading", str(unreadable)).refusal))
    return matches, missed + [_inside(node) for node in view.graph.nodes if _hides_attention(node)]


def _hides_attention(node: fx.Node) -> bool:
    """Whether a higher-order operator has attention in the graphs that it runs."""
    if node.target is torch.ops.higher_order.flex_attention:
        return False
    return any(mentions_attention(body) for body in bodies_of(node))


def _inside(node: fx.Node) -> Missed:
    hint = "disable gradient checkpointing to have it replaced" if "checkpoint" in _spelled(node) else ""
    reason = f"it is inside {_spelled(node)}, and graphs within the graph are not looked into"
    return Missed(node.name, location(node), Refused("higher order", reason, hint).refusal)


def mentions_attention(graph: fx.Graph) -> bool:
    """A quick look for anything that could be attention, so that other graphs cost nothing."""
    names = ("softmax", "attention", "transformer_encoder_layer")
    return any(
        any(name in str(getattr(node.target, "__name__", node.target)) for name in names) or _hides_attention(node)
        for node in graph.nodes
        if node.op.startswith("call_")
    )


def _anchors(view: GraphView) -> Iterator[Call]:
    for node in view.graph.nodes:
        call = view.call(node)
        if call is not None and call.name in _DRAFTS:
            yield call


def _reader(view: GraphView, readers: dict[tuple, Reader], products: bool, batch, heads, q_len, k_len) -> Reader:
    key = (products, batch, heads, q_len, k_len)
    if key not in readers:
        readers[key] = Reader(view, {b: batch, h: heads, q: q_len, k: k_len}, products=products)
    return readers[key]


def _batch_index(sizes: tuple) -> tuple[tuple[Any, ...], Any, Any]:
    """(index of each batch dimension in b and h, batch, heads): the first is b, the others together are h."""
    if not sizes:
        return (), sympy.Integer(1), sympy.Integer(1)
    if len(sizes) == 1:
        return (b,), sizes[0], sympy.Integer(1)
    index: list[Any] = []
    rest: Any = h
    for number, size in reversed(list(enumerate(sizes[1:]))):
        if number == 0:
            index.append(rest)
        elif size == 1:
            index.append(sympy.Integer(0))
        else:
            index.append(expr.Modulo(rest, size))
            rest = expr.FloorDiv(rest, size)
    return (b, *reversed(index)), sizes[0], sympy.prod(sizes[1:])


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
    index, batch, heads = _batch_index(q_shape[:-2])
    q_len, k_len, head_dim, value_dim = q_shape[-2], k_shape[-2], q_shape[-1], v_shape[-1]
    require_fixed(heads, head_dim)
    reader = _reader(view, readers, False, batch, heads, q_len, k_len)
    time = view.time[call.node]

    def operand(node: fx.Node, shape: tuple, name: str, length) -> Operand:
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
        return _operand(view, node, (*inside, row, depth), time, name, (batch, heads, length, shape[-1]))

    if not head_dim.is_Integer:
        raise Refused("head_dim", "head_dim is not a constant")
    scale = call.get("scale")
    factor = sympy.Float(1 / math.sqrt(int(head_dim))) if scale is None else reader.read(scale, time).at(())
    operands = [operand(query, q_shape, "query", q_len), operand(key, k_shape, "key", k_len)]
    operands.append(operand(value, v_shape, "value", k_len))
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
    _note_folding(operands, notes)
    if operands[2].factor != 1:
        raise Refused("value", "value is scaled by a constant on the way to attention")
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


def _operand(view: GraphView, node: fx.Node, index: tuple, time: int, name: str, sizes: tuple, dtype=None) -> Operand:
    batch, heads, length, width = sizes
    bounds = Reader(view, {b: batch, h: heads, row: length, depth: width})
    found = trace(view, bounds, node, index, time, dtype)
    if found is None:
        raise Refused("operands", f"the layout of {name} is not understood: {node.name} at {index}")
    return found


def _note_folding(operands: list[Operand], notes: list[str]) -> None:
    if any(what in operand.folded for operand in operands[1:] for what in ("expand", "repeat_interleave")):
        notes.append("grouped heads folded back: key and value are not expanded")
    if any("scale" in operand.folded for operand in operands):
        notes.append("scale on query or key moved to the score")


# -- softmax ------------------------------------------------------------------------------------------------------


def _from_softmax(view: GraphView, call: Call, readers: dict[tuple, Reader]) -> Draft:
    scores = call.get("input")
    if not isinstance(scores, fx.Node) or view.tensor(scores) is None or not isinstance(call.get("dim"), int):
        raise Refused("arguments", "softmax without a constant dim over a tensor")
    shape, time = view.shape(scores), view.time[call.node]
    dim = call.get("dim") % len(shape)
    product, q_dim = _query_key_product(view, readers, scores, shape, dim, time)
    rest = [n for n in range(len(shape)) if n not in (dim, q_dim)]
    batch_index, batch, heads = _batch_index(tuple(shape[n] for n in rest))
    index: list[Any] = [None] * len(shape)
    for n, entry in zip(rest, batch_index, strict=True):
        index[n] = entry
    index[q_dim], index[dim] = q, k
    q_len, k_len = shape[q_dim], shape[dim]
    reader = _reader(view, readers, True, batch, heads, q_len, k_len)
    term, inside = _scores_at(view, reader, scores, tuple(index), time, product)

    sides = _sides(product, inside)
    if sides is None:
        raise Refused("product", "query and key cannot be told apart in the product before softmax")
    replaced, value_product, placed = _follow_weights(view, call.node, tuple(index), reader)
    head_dim, dtype = view.shape(product.left)[product.left_labels.index(product.summed)], view.held(replaced).dtype
    operands = []
    for name, side, length, free in (("query", sides[0], q_len, q), ("key", sides[1], k_len, k)):
        node, labels = product.operand(side)
        at = dict(zip(product.out_labels, inside, strict=True))
        entries = _operand_index(view, node, labels, {**at, product.summed: depth}, {free: row})
        sizes = (batch, heads, length, head_dim)
        operands.append(_operand(view, node, entries, view.time[product.node], name, sizes, dtype))
    term = term.subs(s, operands[0].factor * operands[1].factor * s)

    value, out_index, value_dim = _value(view, value_product, placed, (batch, heads, k_len))
    if value.factor != 1:
        raise Refused("value", "value is scaled by a constant on the way to attention")
    notes: list[str] = []
    _note_folding([*operands, value], notes)
    if view.held(product.node).dtype == view.held(replaced).dtype != view.held(product.left).dtype:
        notes.append("autocast")
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
        notes=notes,
    )


def _query_key_product(
    view: GraphView, readers: dict[tuple, Reader], scores: fx.Node, shape: tuple, dim: int, time: int
) -> tuple[Contraction, int]:
    """The product that the scores are made of, and the dimension of the scores that is the query row."""
    symbols = [sympy.Symbol(f"g{n}", integer=True, nonnegative=True) for n in range(len(shape))]
    sizes = dict(zip(symbols, shape, strict=True))
    reader = readers.setdefault(("product", *shape), Reader(view, sizes, products=True))
    term = reader.read(scores, time).at(tuple(symbols))
    candidates: list[tuple[Contraction, int]] = []
    wrong_axis = False
    for raw in {load for load in expr.loads_of(term) if load.name in reader.raw}:
        product = reader.raw[raw.name]
        free = {
            side: {x for label, e in zip(product.out_labels, raw.indices, strict=True) if label in labels
                   for x in sympy.sympify(e).free_symbols}
            for side, labels in (("left", product.left_labels), ("right", product.right_labels))
        }  # fmt: skip
        key_side = [side for side in free if symbols[dim] in free[side]]
        if len(key_side) != 1:
            continue
        query_side = "left" if key_side[0] == "right" else "right"
        rows = [n for n, x in enumerate(symbols) if x in free[query_side] - free[key_side[0]]]
        if rows:
            candidates.append((product, rows[-1]))
        else:
            wrong_axis = True
    if not candidates:
        if wrong_axis:
            raise Refused("softmax axis", "the softmax does not run over the keys of a product of queries and keys")
        reason = _why_no_product(view, reader, term)
        raise Refused(NOT_ATTENTION if reason == NO_PRODUCT else "no product", reason)
    if len({id(product.node) for product, _ in candidates}) > 1:
        raise Refused("several products", "the scores add several products of queries and keys", "not supported yet")
    return candidates[0]


def _why_no_product(view: GraphView, reader: Reader, term) -> str:
    """What keeps the scores from being read down to a product, if there is one above them."""
    for name in [load.name for load in expr.loads_of(term) if load.name not in reader.raw]:
        node = reader.loads[name].node
        if not _product_above(view, node):
            continue
        if view.cuts_gradient(node, reader.loads[name].time):
            return f"{_spelled(node)} stops the gradient between the product of query and key and softmax"
        writers = view.writes_between(node, view.time[node], reader.loads[name].time)
        if writers:
            return f"{_spelled(writers[-1])} writes into the scores before softmax, which is not understood"
        return f"{_spelled(node)} stands between the product of query and key and softmax and has no symbolic meaning"
    if term.is_number:
        return "the mask allows nothing at all"
    return NO_PRODUCT


# products with weights: what comes out of one is no product of queries and keys, whatever lies above it
_LAYERS = (F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d, F.bilinear, torch.addmm)


def _product_above(view: GraphView, node: fx.Node) -> bool:
    """Whether a product of two computed tensors lies above ``node``, with no layer in between."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.target in _LAYERS:
            continue
        if contraction(view, node) is not None:
            return True
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return False


def _scores_at(view: GraphView, reader: Reader, scores: fx.Node, index: tuple, time: int, product: Contraction):
    """The scores at ``index`` with s for the product, and the product's own index."""
    term = reader.read(scores, time).at(index)
    raws = [load for load in expr.loads_of(term) if load.name in reader.raw]
    ours = [load for load in raws if reader.raw[load.name].node is product.node]
    if len(ours) != 1:
        raise Refused("product", "the scores read their product at several places")
    swap: dict[Any, Any] = {ours[0]: s}
    for other in raws:
        if other is not ours[0]:
            node = reader.raw[other.name].node
            swap[other] = reader.as_data(node, view.time[node] + 1).at(other.indices)  # before anyone writes to it
    return term.xreplace(swap), ours[0].indices


def _sides(product: Contraction, inside: tuple) -> tuple[str, str] | None:
    at = dict(zip(product.out_labels, inside, strict=True))
    has = {
        side: {x for label in labels if label in at for x in sympy.sympify(at[label]).free_symbols}
        for side, labels in (("left", product.left_labels), ("right", product.right_labels))
    }
    for query, key in (("left", "right"), ("right", "left")):
        if q in has[query] and k not in has[query] and k in has[key] and q not in has[key]:
            return query, key
    return None


def _operand_index(view: GraphView, node: fx.Node, labels: tuple, at: dict[str, Any], rename: dict) -> tuple:
    """The index of an operand; dimensions of size 1 are broadcast."""
    sizes = view.shape(node)
    own = (*rename, depth)  # the row and head_dim of the operand itself are never broadcast
    return tuple(
        sympy.Integer(0) if size == 1 and at[label] not in own else sympy.sympify(at[label]).xreplace(rename)
        for label, size in zip(labels, sizes, strict=True)
    )


def _follow_weights(view: GraphView, softmax: fx.Node, index: tuple, reader: Reader):
    """From the softmax through casts and views to the product with value: (its node, the product, weights' index)."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            where = ", ".join(user.name for user in users) or "nobody"
            raise Refused(
                "weights", f"the attention weights are used elsewhere (by {where})", "ask the model not to return them"
            )
        user = users[0]
        product = contraction(view, user)
        if product is not None:
            if (product.left is node) == (product.right is node):
                raise Refused("weights", "the weights are multiplied with themselves")
            if view.writes(user):
                raise Refused("output", f"{_spelled(user)} writes its result into another tensor (out=)")
            if (call := view.call(user)) is not None and call.name == "baddbmm" and not _adds_nothing(call):
                raise Refused("output", "baddbmm adds a tensor to the product of weights and value")
            return user, product, (node, index)
        call = view.call(user)
        if call is None or view.writes(user):
            raise Refused("weights", f"{_spelled(user)} stands between softmax and value")
        if view.cuts_gradient(user, view.time[user] + 1):
            raise Refused("gradient", f"{_spelled(user)} stops the gradient between softmax and value")
        if call.name == "dropout" and not is_dead_dropout(call):
            raise Refused(
                "dropout", f"attention dropout p={call.get('p')} is live", "call model.eval(), or set it to 0"
            )
        if call.name == "reshape":
            # where an element of the view lies in the weights: read backwards
            moved = (
                None if reinterprets(view, call) else reshape_index(reader, view.shape(user), view.shape(node), index)
            )
            if moved is None:
                raise Refused("weights", f"the view {user.name} of the weights is not understood")
            index = moved
        elif (order := permutation(call, len(index))) is not None:
            index = tuple(index[old] for old in order)
        elif call.name not in ("identity", "dropout", "to", "type_as") and not call.name.startswith("cast_"):
            raise Refused("weights", f"{_spelled(user)} stands between softmax and value")
        elif not view.held(user).dtype.is_floating_point or view.held(user).dtype.itemsize < 2:
            raise Refused("weights", f"the weights are cast to {view.held(user).dtype}")
        node = user


def _adds_nothing(call: Call) -> bool:
    return call.get("beta", 1) == 0 and call.get("alpha", 1) == 1


def _value(view: GraphView, product: Contraction, placed: tuple, sizes: tuple):
    weights, index = placed
    side = "left" if product.left is weights else "right"
    labels = product.operand(side)[1]
    node, value_labels = product.operand("right" if side == "left" else "left")
    at: dict[str, Any] = dict(zip(labels, index, strict=True))
    if at[product.summed] != k:
        raise Refused("value", "the product after softmax does not run over the keys")
    widths = [label for label in value_labels if label not in at]
    if len(widths) != 1:
        raise Refused("value", "value does not have exactly one dimension of its own")
    value_dim = view.shape(node)[value_labels.index(widths[0])]
    at[widths[0]] = depth
    entries = _operand_index(view, node, value_labels, at, {k: row})
    batch, heads, k_len = sizes
    value = _operand(view, node, entries, view.time[product.node], "value", (batch, heads, k_len, value_dim))
    return value, tuple(at[label] for label in product.out_labels), value_dim


def _spelled(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_DRAFTS = {"sdpa": _from_sdpa, "softmax": _from_softmax, "flex_attention": from_flex}  # by the anchor's name

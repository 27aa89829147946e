"""Follows attention weights from the softmax to the product with value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import k
from effattn.ir.refusal import Why
from effattn.passes.candidate.operands import only_new_dims
from effattn.passes.candidate.record import Dropout, Refused, Zeroed
from effattn.passes.candidate.stand_ins import reads_no_values, require_stand_in
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.provenance import spelled
from effattn.passes.graph.sizes import equal
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, drops_elements, is_dead_dropout
from effattn.passes.match.products import adds_nothing
from effattn.passes.match.sink import Columns, dropped_columns
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.pointwise import aligned
from effattn.passes.symbolic.reader import generic_index
from effattn.passes.symbolic.views import permutation, reinterprets, reshape_index


@dataclass(frozen=True)
class Weighted:
    """The product with value, and what happened to the weights before it."""

    replaced: fx.Node
    product: Contraction
    weights: fx.Node
    index: tuple[Any, ...]  # of the weights' dimensions in b, h, q, k
    zeroed: tuple[Zeroed, ...] = ()
    nan_is_zero: bool = False
    factor: Any = 1
    dropout: Dropout | None = None


def follow_weights(
    view: GraphView, softmax: fx.Node, index: tuple, reader: Reader, columns: Columns | None
) -> Weighted:
    """Follow the weights from the softmax through casts and views to the product with value.

    ``columns``: weights of sinks, which must be dropped in between.

    Raises Refused if another operation is in between, or the weights have other users.
    """
    node, factor, nan_is_zero = softmax, sympy.Integer(1), False
    zeroed: list[Zeroed] = []
    dropout: Dropout | None = None
    whole = softmax  # a node that has each weight once
    while True:
        users = _who_read_values(view, node)
        if users and (call := _zeroing_in_place(view, reader, users[0], node)) is not None:
            zeroed.append(Zeroed(_mask_at(reader, call, index, view.shape(node)), call.node))
            users = [*users[0].users, *users[1:]]  # after the write, the tensor is known by two nodes
            node = call.node if call.node.users else node
        if (cleared := _nan_set_to_zero(view, reader, node, users)) is not None:
            users, nan_is_zero = [cleared], True
        if len(users) != 1:
            raise _used_elsewhere(view, users)
        user = users[0]
        product = contraction(view, user)
        if product is not None:
            _require_plain_product(view, product, node, columns)
            return Weighted(user, product, node, index, tuple(zeroed), nan_is_zero, factor, dropout)
        call = view.call(user)
        if call is None or view.writes(user):
            raise Refused(Why.WEIGHTS, f"{spelled(user)} stands between softmax and value", at=user)
        if view.cuts_gradient(user, view.time[user] + 1):
            raise Refused(Why.GRADIENT, f"{spelled(user)} stops the gradient between softmax and value", at=user)
        if call.name == "dropout" and not is_dead_dropout(call):
            if dropout is not None:
                raise Refused(Why.DROPOUT, "weights are dropped twice between softmax and value", at=user)
            dropout = _live_dropout(view, call, whole, index, columns)
        if columns is not None and k in index and dropped_columns(view, call, index.index(k)) == columns:
            columns, whole = None, user
        elif call.name == "reshape" or (call.name == "getitem" and only_new_dims(call.get("index"))):
            # from the element of the view back to the element of the weights
            moved = (
                None if reinterprets(view, call) else reshape_index(reader, view.shape(user), view.shape(node), index)
            )
            if moved is None:
                raise Refused(
                    Why.WEIGHTS, f"the dimensions of the weights after {spelled(user)} are not understood", at=user
                )
            index = moved
        elif (order := permutation(call, len(index))) is not None:
            index = tuple(index[old] for old in order)
        elif user is cleared:
            pass
        elif (found := _multiplied(view, reader, call, node, index)) is not None:
            factor *= found if isinstance(found, sympy.Number) else 1
            zeroed += [found] if isinstance(found, Zeroed) else []
        elif call.name not in ("identity", "dropout") and not call.casts:
            raise Refused(Why.WEIGHTS, f"{spelled(user)} stands between softmax and value", at=user)
        elif not view.held(user).dtype.is_floating_point or view.held(user).dtype.itemsize < 2:
            raise Refused(Why.WEIGHTS, f"the weights are cast to {view.held(user).dtype}", at=user)
        node = user


def _live_dropout(view: GraphView, call: Call, whole: fx.Node, index: tuple, columns: Columns | None) -> Dropout:
    """Raises Refused if it does not drop each weight on its own."""
    if not drops_elements(call) or call.get("training", True) is not True:
        raise Refused(Why.DROPOUT, f"{spelled(call.node)} is live, and is no plain dropout", at=call.node)
    sizes = (sympy.prod(view.shape(node)) for node in (whole, call.node))
    if columns is not None or not equal(view, *sizes):
        raise Refused(Why.DROPOUT, "not each weight of the attention is dropped on its own", at=call.node)
    return Dropout.read(call.node, call.get("p", 0.5), index)


def _require_plain_product(view: GraphView, product: Contraction, weights: fx.Node, columns: Columns | None) -> None:
    """Raises Refused if the product is not of weights and value alone."""
    node = product.node
    if columns is not None:
        raise Refused(Why.SINK, "the weights of the sink columns are not dropped before the product with value")
    if (product.left is weights) == (product.right is weights):
        raise Refused(Why.WEIGHTS, "the weights are multiplied by themselves")
    if view.writes(node):
        raise Refused(Why.OUTPUT, f"{spelled(node)} writes its result into another tensor (out=)", at=node)
    if (call := view.call(node)) is not None and call.name == "baddbmm" and not adds_nothing(call):
        raise Refused(Why.OUTPUT, "baddbmm adds a tensor to the product of weights and value", at=node)


def _nan_set_to_zero(view: GraphView, reader: Reader, node: fx.Node, users: list[fx.Node]) -> fx.Node | None:
    """``nan_to_num(weights)``, ``where(isnan(weights), 0, weights)``, ``weights.masked_fill(isnan(weights), 0)``."""
    calls = [call for user in users if (call := view.call(user)) is not None and not view.writes(user)]
    if len(calls) != len(users) or not users:
        return None
    if len(users) == 1 and calls[0].name == "nan_to_num" and calls[0].get("nan") in (None, 0):
        return users[0]
    tests = [call.node for call in calls if call.name == "isnan"]
    others = [call for call in calls if call.name in ("where", "masked_fill")]
    if len(users) != 2 or len(tests) != 1 or len(others) != 1 or list(tests[0].users) != [others[0].node]:
        return None
    (call,) = others
    if call.name == "masked_fill":
        plain = call.get("input") is node and call.get("mask") is tests[0] and _is_zero(reader, call, "value")
    else:
        plain = call.get("other") is node and call.get("condition") is tests[0] and _is_zero(reader, call, "input")
    return call.node if plain else None


def _multiplied(view: GraphView, reader: Reader, call: Call, node: fx.Node, index: tuple) -> Any:
    """The effect of a fill, where() or multiplication on weights: a number (their factor), or a Zeroed.

    None for other calls and other effects.
    """
    shape = view.shape(node)
    if view.shape(call.node) != shape:
        return None
    if call.name == "masked_fill" and call.get("input") is node and _is_zero(reader, call, "value"):
        return Zeroed(_mask_at(reader, call, index, shape), call.node)
    if call.name == "where":
        mask = _mask_at(reader, call, index, shape, "condition")
        for name, other, where in (("other", "input", mask), ("input", "other", sympy.Not(mask))):
            if call.get(name) is node and _is_zero(reader, call, other):
                return Zeroed(where, call.node)
    if call.name not in ("mul", "div"):
        return None
    other = call.get("other") if call.get("input") is node else call.get("input")
    if other is node or (call.name == "div" and (call.get("input") is not node or call.get("rounding_mode"))):
        return None
    reading = reader.read(other, view.time[call.node])
    value = sympy.sympify(reading.number_at(aligned(reading, index, shape)))
    if value.is_Number and value.is_finite and value.is_real and (call.name == "mul" or value != 0):
        return value if call.name == "mul" else 1 / value
    if call.name == "mul" and isinstance(value, expr.Where) and set(value.args[1:]) == {sympy.S.Zero, sympy.S.One}:
        where = value.args[0] if value.args[1].is_zero else sympy.Not(value.args[0])
        return Zeroed(where, call.node, nan_too=False)
    return None


def _who_read_values(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The users of weights, in order, except those that read only shape, dtype or device."""
    users = sorted(node.users, key=lambda user: view.time[user])
    values = [user for user in users if not reads_no_values(view, user, node)]
    if len(values) < len(users):
        require_stand_in(view, node)
    return values


def _used_elsewhere(view: GraphView, users: list[fx.Node]) -> Refused:
    """The refusal for other users of the weights; if the graph ends there, with the reason for that."""
    values = [user for user in users if contraction(view, user) is not None]
    others = [user for user in users if user not in values[:1]]  # the first is the attention itself
    returned = [user for user in others if user.op == "output"]
    where = ", ".join(dict.fromkeys(map(spelled, others))) or "nobody"
    reason = "the attention weights are used elsewhere " + ("(returned)" if returned == others else f"(by {where})")
    hint = "ask the model not to return them" if returned else ""
    end = getattr(view.graph.owning_module, "compile_subgraph_reason", None)  # as Dynamo says it
    if end is not None and end.graph_break and any(user.op == "output" for user in users):
        reason += f"; the graph ends there because of a graph break: {end.reason.splitlines()[0]}"
        setting = "torch._dynamo.config.capture_scalar_outputs"
        hint = f"set {setting} = True" if setting in end.reason else "avoid the graph break"
    return Refused(Why.WEIGHTS, reason, hint, at=next((user for user in others if user not in returned), None))


def _is_zero(reader: Reader, call: Call, name: str) -> bool:
    reading = reader.argument(call, name)
    value = reading.number_at(generic_index(len(reading.shape)))
    return sympy.sympify(value).is_zero is True


def _mask_at(reader: Reader, call: Call, index: tuple, shape: tuple, name: str = "mask") -> Any:
    mask = reader.argument(call, name)
    return mask.bool_at(aligned(mask, index, shape))


def _zeroing_in_place(view: GraphView, reader: Reader, user: fx.Node, weights: fx.Node) -> Call | None:
    """``weights.masked_fill_(mask, 0)``"""
    call = view.call(user)
    if call is None or view.written_as(user) is not weights or call.name != "masked_fill":
        return None
    return call if _is_zero(reader, call, "value") and not view.cuts_gradient(user, view.time[user] + 1) else None

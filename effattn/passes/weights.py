"""Attention weights on their way from the softmax to the product with value."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from effattn.ir.expr import k
from effattn.ir.refusal import Why
from effattn.passes.contraction import contraction
from effattn.passes.draft import Refused
from effattn.passes.graph import GraphView
from effattn.passes.metadata import reads_no_values, require_stand_in
from effattn.passes.operands import only_new_dims
from effattn.passes.products import (
    adds_nothing,
    spelled,
)
from effattn.passes.reading import Reader
from effattn.passes.reading.elementwise import aligned
from effattn.passes.reading.views import permutation, reinterprets, reshape_index
from effattn.passes.sink_column import drops_the_sink
from effattn.passes.vocabulary import Call, is_dead_dropout


def follow_weights(view: GraphView, softmax: fx.Node, index: tuple, reader: Reader, sink: bool):
    """From the softmax through casts and views to the product with value.

    Returns (its node, the product, the weights and their index, where they were set to zero on the way).
    ``sink``: the weights have a last column that has to be dropped on the way.
    """
    node = softmax
    zeroed: list[Any] = []
    while True:
        users = _who_read_values(view, node)
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
                raise Refused(Why.SINK, "the weights of the sink column are not dropped before the product with value")
            if (product.left is node) == (product.right is node):
                raise Refused(Why.WEIGHTS, "the weights are multiplied with themselves")
            if view.writes(user):
                raise Refused(Why.OUTPUT, f"{spelled(user)} writes its result into another tensor (out=)", at=user)
            if (call := view.call(user)) is not None and call.name == "baddbmm" and not adds_nothing(call):
                raise Refused(Why.OUTPUT, "baddbmm adds a tensor to the product of weights and value", at=user)
            return user, product, (node, index), tuple(zeroed)
        call = view.call(user)
        if call is None or view.writes(user):
            raise Refused(Why.WEIGHTS, f"{spelled(user)} stands between softmax and value", at=user)
        if view.cuts_gradient(user, view.time[user] + 1):
            raise Refused(Why.GRADIENT, f"{spelled(user)} stops the gradient between softmax and value", at=user)
        if sink and drops_the_sink(call, index.index(k) if k in index else -1, len(index)):
            node, sink = user, False
            continue
        if call.name == "dropout" and not is_dead_dropout(call):
            raise Refused(
                Why.DROPOUT, f"attention dropout p={call.get('p')} is live", "call model.eval(), or set it to 0"
            )
        if call.name == "reshape" or (call.name == "getitem" and only_new_dims(call.get("index"))):
            # where an element of the view lies in the weights: read backwards
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
        elif _fills_with_zeros(reader, call):
            zeroed.append(_mask_at(reader, call, index, view.shape(node)))
        elif call.name not in ("identity", "dropout") and not call.casts:
            raise Refused(Why.WEIGHTS, f"{spelled(user)} stands between softmax and value", at=user)
        elif not view.held(user).dtype.is_floating_point or view.held(user).dtype.itemsize < 2:
            raise Refused(Why.WEIGHTS, f"the weights are cast to {view.held(user).dtype}", at=user)
        node = user


def _who_read_values(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The users of weights, in order, but for those that read only their shape, dtype or device."""
    users = sorted(node.users, key=lambda user: view.time[user])
    values = [user for user in users if not reads_no_values(view, user, node)]
    if len(values) < len(users):
        require_stand_in(view, node)
    return values


def _used_elsewhere(view: GraphView, users: list[fx.Node]) -> Refused:
    """Who else uses the weights; if it is what comes after the graph, why the graph ends."""
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

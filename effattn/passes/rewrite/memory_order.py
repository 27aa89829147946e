"""Memory order of replacements: user code may rely on strides, for example with ``view``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from effattn.passes.graph.insertion import Inserter, evaluate
from effattn.passes.graph.view import GraphView, as_sympy, hint

_LOOKS_AT_STRIDES = ("as_strided", "as_strided_", "stride", "is_contiguous", "storage_offset", "data_ptr")


def in_order_of(view: GraphView, inserter: Inserter, old: fx.Node, new: fx.Node) -> fx.Node:
    """``new``, or a copy with the strides of ``old`` if they differ and the difference may be observed."""
    before, after = old.meta["example_value"], new.meta["example_value"]
    if _strides(before) == _strides(after) or not _relied_on(view, inserter, old, after):
        return new
    order = sorted(range(before.dim()), key=lambda dim: (-hint(before.stride(dim)), dim))
    if order == list(range(before.dim())):
        return inserter.method("contiguous", new)
    inverse = tuple(order.index(dim) for dim in range(before.dim()))
    dense = inserter.method("contiguous", inserter.method("permute", new, tuple(order)))
    return inserter.method("permute", dense, inverse)


def _strides(value: torch.Tensor) -> list[Any]:
    """Strides of the dimensions that have more than one element."""
    return [as_sympy(stride) for size, stride in zip(value.shape, value.stride(), strict=True) if as_sympy(size) != 1]


def _relied_on(view: GraphView, inserter: Inserter, old: fx.Node, after: torch.Tensor) -> bool:
    """Whether other strides could be observed: outside the graph, by a custom kernel, or by a view that they forbid.

    Follows strides through views, and through operations whose result has the memory order of their input.
    """
    values: dict[fx.Node, Any] = {old: after.detach()}  # detached: in-place operations may change it
    waiting = [old]
    while waiting:
        node = waiting.pop(0)
        for user in node.users:
            if user in values or user not in view.time:
                continue
            if user.op == "output" or _looks(user):
                return True
            try:
                values[user] = _evaluate(inserter, user, values)
            except Exception:  # an operation may reject these strides in any way
                return True
            if _differ(values[user], user.meta.get("example_value")):
                waiting.append(user)
    return False


def _differ(after: Any, before: Any) -> bool:
    """Whether results of one operation have different strides."""
    pairs = zip(tree_leaves(after), tree_leaves(before), strict=False)
    return any(
        _strides(one) != _strides(other)
        for one, other in pairs
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    )


def _looks(user: fx.Node) -> bool:
    name = str(getattr(user.target, "__name__", user.target))
    if name in _LOOKS_AT_STRIDES:
        return True
    if user.op != "call_function":
        return False
    target: Any = user.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target).split(".")[0] not in ("aten", "prims", "effattn")
    return False


def _evaluate(inserter: Inserter, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values.get(n, n.meta.get("example_value")))
    return evaluate(inserter.mode, node, args, kwargs)

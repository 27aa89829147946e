"""Uses of a tensor that read only its shape, dtype or device: ``bias.type_as(weights)``.

These do not keep weights alive: an erased node leaves a stand-in with the same metadata, an expanded zero.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from effattn.errors import RewriteError
from effattn.ir import expr
from effattn.ir.refusal import Why
from effattn.passes.candidate.naming import size_source
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.dead_code import only_a_value
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.view import GraphView

# operation -> position of the argument of which it reads only metadata; methods, and functions of torch
_READERS: dict[Any, int] = {
    **dict.fromkeys(("type_as", "view_as", "reshape_as", "expand_as", "to"), 1),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "size", "dim", "numel"), 0),
}
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
_IN_ITS_ORDER = tuple(getattr(torch, name) for name in _LIKE)  # their result has the memory order of the argument
_READERS |= dict.fromkeys(_IN_ITS_ORDER, 0)
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")


def reads_metadata_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether the result of ``user`` does not depend on the values of ``node``."""
    if user.target is getattr:
        return user.args[1] in _ATTRIBUTES
    place = _READERS.get(user.target) if user.op in ("call_function", "call_method") else None
    if place is None:
        return False
    read = user.args[place] if place < len(user.args) else user.kwargs.get("other")
    given: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), given.append)
    return read is node and given.count(node) == 1


def reads_no_values(view: GraphView, user: fx.Node, node: fx.Node) -> bool:
    """Like :func:`reads_metadata_only`, also for views and casts of which only metadata is read."""
    if reads_metadata_only(user, node):
        return True
    passes_on = bool(user.users) and only_a_value(view, user) and not view.writes(user)
    return passes_on and all(reads_no_values(view, further, user) for further in user.users)


def require_stand_in(view: GraphView, node: fx.Node) -> None:
    """Raises Refused if nothing can stand in for ``node``: its memory order is used and is not contiguous, or its size
    is not made of sums and products of lengths."""
    ordered = any(user.target in _IN_ITS_ORDER for user in node.users)
    if ordered and not view.held(node).is_contiguous():
        raise Refused(Why.WEIGHTS, f"the memory order of {node.name} is used, and it is not contiguous")
    for size in view.shape(node):
        for symbol in size.free_symbols:
            size_source(view, symbol, view.time[node])
        if not _is_emitted(size):
            raise Refused(Why.WEIGHTS, f"the size {size} of {node.name} is used, and is not a length of the graph")


def leave_stand_ins(view: GraphView, replaced: list[fx.Node], weights: set[str]) -> tuple[int, list[fx.Node]]:
    """Give readers of metadata a stand-in for nodes that are about to be erased.

    Only nodes that ``replaced`` was computed from, or that are computed from the nodes named in ``weights``, and that
    have no other users. Returns (number of inserted nodes, nodes that may be erased now).
    """
    going, written = set(replaced), 0
    unread: list[fx.Node] = []
    near = going | _made_of(view, weights)
    for node in sorted(view.time, key=lambda node: -view.time[node]):
        if node not in near or not (node in going or _goes(view, node, going)):
            continue
        going.add(node)
        near.update(source for source in node.all_input_nodes if source in view.time)
        readers = [user for user in node.users if user not in going]
        if not readers:
            continue
        insert = Inserter(view.graph, node)
        with view.graph.inserting_before(min(readers, key=lambda user: view.time[user])):
            stand_in = _stand_in(view, insert, node)
        for user in readers:
            user.replace_input_with(node, stand_in)
        written += len(insert.nodes)
        unread.append(node)
    return written, unread


def _made_of(view: GraphView, names: set[str]) -> set[fx.Node]:
    made: set[fx.Node] = set()
    for node in view.time:
        if node.name in names or not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    return made


def _goes(view: GraphView, node: fx.Node, going: set[fx.Node]) -> bool:
    """Whether ``node`` is used only by erased nodes and readers of metadata, and a stand-in is possible."""
    if not only_a_value(view, node) or view.tensor(node) is None:
        return False
    readers = [user for user in node.users if user not in going]
    if not readers:
        return True
    if view.writes_between(node, -1, len(view.time)) or not all(reads_metadata_only(user, node) for user in readers):
        return False
    try:
        require_stand_in(view, node)
    except Refused:
        return False
    return True


def _stand_in(view: GraphView, insert: Inserter, node: fx.Node) -> fx.Node:
    held = view.held(node)
    zero = insert.call(torch.zeros, (), dtype=held.dtype, device=held.device)
    sizes = tuple(_size(view, insert, size, view.time[node]) for size in view.shape(node))
    return insert.method("expand", zero, sizes)


def _is_emitted(size: Any) -> bool:
    if size.is_Integer or size.is_Symbol:
        return True
    return isinstance(size, (sympy.Add, sympy.Mul, expr.FloorDiv)) and all(map(_is_emitted, size.args))


def _size(view: GraphView, insert: Inserter, size: Any, end: int) -> Any:
    """The value of ``size`` as an int or a node."""
    if size.is_Integer:
        return int(size)
    if size.is_Symbol:
        source = size_source(view, size, end)
        return source.node if source.dim is None else insert.method("size", source.node, source.dim)
    operation = {sympy.Add: operator.add, sympy.Mul: operator.mul, expr.FloorDiv: operator.floordiv}.get(size.func)
    if operation is None:
        raise RewriteError(f"the size {size} is not a length of the graph")
    first, *rest = (_size(view, insert, part, end) for part in size.args)
    for part in rest:
        first = insert.call(operation, first, part)
    return first

"""Uses of a tensor that read its shape, dtype or device, and none of its values: ``bias.type_as(weights)``.

They do not keep weights alive: what goes leaves a stand-in of the same metadata, one zero that is expanded.
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

# operation -> the place of the argument of which only the metadata is read; as methods, and as functions of torch
_READERS: dict[Any, int] = {
    **dict.fromkeys(("type_as", "view_as", "reshape_as", "expand_as", "to"), 1),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "size", "dim", "numel"), 0),
}
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like")
_IN_ITS_ORDER = tuple(getattr(torch, name) for name in _LIKE)  # what they make has the memory order of what they read
_READERS |= dict.fromkeys(_IN_ITS_ORDER, 0)
_ATTRIBUTES = ("shape", "dtype", "device", "ndim")


def reads_metadata_only(user: fx.Node, node: fx.Node) -> bool:
    """Whether nothing that ``user`` computes depends on the values in ``node``."""
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
    """As :func:`reads_metadata_only`, also where ``user`` is a view or cast of which only the metadata is read."""
    if reads_metadata_only(user, node):
        return True
    passes_on = bool(user.users) and only_a_value(view, user) and not view.writes(user)
    return passes_on and all(reads_no_values(view, further, user) for further in user.users)


def require_stand_in(view: GraphView, node: fx.Node) -> None:
    """Raises: Refused: nothing can stand in for ``node``: it lies in memory in an order of its own, or its size is
    no sum of products of lengths."""
    ordered = any(user.target in _IN_ITS_ORDER for user in node.users)
    if ordered and not view.held(node).is_contiguous():
        raise Refused(Why.WEIGHTS, f"the memory order of {node.name} is used, and it is not the plain one")
    for size in view.shape(node):
        for symbol in size.free_symbols:
            size_source(view, symbol, view.time[node])
        if not _is_emitted(size):
            raise Refused(Why.WEIGHTS, f"the size {size} of {node.name} is used, and is not a length of the graph")


def leave_stand_ins(view: GraphView, replaced: list[fx.Node], weights: set[str]) -> tuple[int, list[fx.Node]]:
    """Give those who read only the metadata of nodes that can go something else to read.

    Only of nodes that ``replaced`` was made of, or that are made of the nodes named in ``weights``, and that nobody
    else reads. Returns how many nodes were written, and those that may go now.
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
    """Whether only nodes that go and readers of metadata use ``node``, and something can stand in for it."""
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
    """The number that ``size`` is, as an int or a node."""
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

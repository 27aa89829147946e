"""Removes nodes that the rewriting left unused, if they have no side effect.

``Graph.eliminate_dead_code`` must not be used on Dynamo's graphs: it considers an ``index_copy_`` without users dead,
although it writes the key/value cache.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effattn.passes.graph.block_mask_code import is_block_mask_code
from effattn.passes.graph.contraction import CONTRACTIONS
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, canonical, is_dead_dropout, named
from effattn.passes.graph.writes import writes

_LARGEST_PART = 200  # most nodes that are erased together
_KEEP_STATISTICS = ("batch_norm", "instance_norm")  # write their arguments, which their schemas do not declare


def erase_unused_weights(graph: fx.Graph) -> int:
    """Erase attention weights that nothing reads, as where a model returns them only on request.

    Only nodes between a softmax and the product with value are candidates (an unread state of linear attention is kept,
    since it shows how fast the state decays), and only those without side effects. Returns the number of erased nodes.
    """
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        if not node.op.startswith("call_"):
            continue
        name = named(node.target) if node.op != "call_module" else None
        from_weights = name not in CONTRACTIONS and not weights.isdisjoint(node.all_input_nodes)
        if name == "softmax" or from_weights:
            weights.add(node)
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        if node in weights and not node.users and not writes(node) and not _has_effect(node, canonical(node)):
            weights.update(node.all_input_nodes)  # their other users may be gone now
            graph.erase_node(node)
    return before - len(graph.nodes)


def _has_effect(node: fx.Node, call: Call | None) -> bool:
    """Whether a node that writes nothing has another side effect: it draws random numbers or requires a gradient."""
    if call is None:
        leaves = pytree.tree_leaves(GraphView.value(node))
        plain = bool(leaves) and all(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return not (plain and _is_pure(node.target))
    if call.name == "dropout":
        return not is_dead_dropout(call)
    return call.get("dropout_p", 0.0) != 0.0 or node.target == "requires_grad_"


def _is_pure(target: Any) -> bool:
    """Whether ``target``, outside the vocabulary, is an ATen operation that draws, writes and synchronises nothing."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if not isinstance(target, str) and (getattr(target, "__module__", None) or "torch").split(".")[0] != "torch":
        return False
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and name not in _KEEP_STATISTICS else None
    if packet is None:
        return False
    operations = [getattr(packet, overload) for overload in packet.overloads()]
    with_effect = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    return not any(with_effect.intersection(operation.tags) for operation in operations)


def erase_orphans(view: GraphView, replaced: list[fx.Node], drawn: Collection[fx.Node] = ()) -> None:
    """Erase the replaced nodes and the nodes that only they used: mask code, expanded heads, score arithmetic.

    A node is erased only if it is known to have no side effect. Nodes that share memory are erased together:
    ``scores += mask`` is dead once nothing else reads those scores. ``drawn``: nodes whose random numbers are drawn
    elsewhere now.
    """
    sharing: dict[object, list[fx.Node]] = defaultdict(list)
    for node in view.time:
        sharing[view.memory_of(node)].append(node)
    waiting = list(replaced)
    erased: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in erased:
            continue
        for dead in _dead_part(view, node, sharing, erased, drawn):
            waiting += [source for source in dead.all_input_nodes if source in view.time]
            view.graph.erase_node(dead)
            erased.add(dead)


def _dead_part(
    view: GraphView,
    node: fx.Node,
    sharing: dict[object, list[fx.Node]],
    gone: set[fx.Node],
    drawn: Collection[fx.Node],
) -> list[fx.Node]:
    """The nodes that can be erased together with ``node``, users first; [] if it must stay.

    These are all nodes that share its memory and all their users: ``scores[1:] = f(scores[1:])``.
    """

    def has_effect(node: fx.Node) -> bool:
        return node not in drawn and not only_a_value(view, node)

    if not node.users and not has_effect(node) and not view.writes(node):
        return [node]
    part: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        member = waiting.pop()
        if member in part or member in gone:
            continue
        if member not in view.time or has_effect(member) or len(part) > _LARGEST_PART:
            return []
        part.add(member)
        waiting += [*member.users, *sharing[view.memory_of(member)]]
    return sorted(part, key=lambda member: -view.time[member])


def only_a_value(view: GraphView, node: fx.Node) -> bool:
    """Whether a node is known to have no side effect."""
    call = view.call(node)
    return (call is not None and not _has_effect(node, call)) or is_block_mask_code(node)

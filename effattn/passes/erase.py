"""Clean-up after the rewriting: only what it orphaned, and only what has no effect.

``Graph.eliminate_dead_code`` must not be used on Dynamo's graphs: it takes ``index_copy_`` without users, the write
into a key/value cache, for dead.
"""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from effattn.passes.block_mask import is_block_mask_code
from effattn.passes.contraction import CONTRACTIONS
from effattn.passes.graph import GraphView, writes
from effattn.passes.reading.elementwise import is_dead_dropout
from effattn.passes.vocabulary import Call, canonical


def erase_unused_weights(graph: fx.Graph) -> int:
    """Erase what nobody reads of attention weights, as a model returns them only to some of its callers.

    Only what is made of a softmax before its product with value: an unread state of linear attention, say, tells how
    fast it decays. Only where an operation has no effect but its value. Returns how many nodes went.
    """
    weights: set[fx.Node] = set()
    for node in graph.nodes:
        call = canonical(node)
        from_weights = (
            call is not None and call.name not in CONTRACTIONS and not weights.isdisjoint(node.all_input_nodes)
        )
        if call is not None and (call.name == "softmax" or from_weights):
            weights.add(node)
    before = len(graph.nodes)
    for node in reversed(graph.nodes):
        call = canonical(node)
        if node in weights and not node.users and call is not None and not writes(node) and not _has_effect(call):
            weights.update(node.all_input_nodes)  # what only they needed goes too
            graph.erase_node(node)
    return before - len(graph.nodes)


def _has_effect(call: Call) -> bool:
    """Whether a call that writes nothing still does something: draw random numbers, or ask for a gradient."""
    if call.name == "dropout":
        return not is_dead_dropout(call)
    return call.get("dropout_p", 0.0) != 0.0 or call.node.target == "requires_grad_"


def erase_orphans(view: GraphView, replaced: list[fx.Node]) -> None:
    """Erase the replaced nodes and whatever only they needed: mask code, expanded heads, score arithmetic.

    A node goes only if its operation is in the vocabulary, so that it is known to have no effect but its value. Nodes
    that share memory go together: ``scores += mask`` is dead once nobody outside reads those scores.
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
        group = [member for member in sharing[view.memory_of(node)] if member not in erased]
        for dead in _dead_part(view, node, group):
            waiting += [source for source in dead.all_input_nodes if source in view.time]
            view.graph.erase_node(dead)
            erased.add(dead)


def _dead_part(view: GraphView, node: fx.Node, group: list[fx.Node]) -> list[fx.Node]:
    """What can be erased together with ``node``, users first; [] if it must stay."""
    if not node.users and _only_a_value(view, node) and not view.writes(node):
        return [node]
    inside = set(group)
    whole = all(_only_a_value(view, member) and all(user in inside for user in member.users) for member in group)
    return sorted(group, key=lambda member: -view.time[member]) if whole else []


def _only_a_value(view: GraphView, node: fx.Node) -> bool:
    return view.call(node) is not None or is_block_mask_code(node)

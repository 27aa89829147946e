"""Nodes that only build block masks: ``create_block_mask`` under torch.vmap. They are erased with the mask."""

from __future__ import annotations

import torch
from torch import fx

# Functions and methods outside the vocabulary that have no side effect, by name.
_VALUES = {
    "sum",
    "argsort",
    "pad",
    "_add_batch_dim",
    "_remove_batch_dim",
    "setitem",  # into a temporary tensor
}
_OPEN, _CLOSE, _LOAD = "_vmap_increment_nesting", "_vmap_decrement_nesting", "lazy_load_decompositions"


def is_block_mask_code(node: fx.Node) -> bool:
    """Whether ``node`` can be erased once nothing uses it or its memory."""
    return node.op == "get_attr" or _name(node) in _VALUES or node.target is torch.ops.aten.index


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def unused_batch_dims(graph: fx.Graph) -> list[fx.Node]:
    """Arguments of a mask_mod under torch.vmap that it does not read; they are dead in the user's graph too."""
    return [node for node in graph.nodes if _name(node) == "_add_batch_dim" and not node.users]


def erase_empty_brackets(graph: fx.Graph) -> None:
    """Erase pairs of torch.vmap's enter and exit calls with no nodes between them."""
    opened: list[fx.Node] = []
    inside: list[int] = [0]
    for node in list(graph.nodes):
        if _name(node) == _OPEN:
            opened.append(node)
            inside.append(0)
        elif _name(node) == _CLOSE and opened:
            start, left = opened.pop(), inside.pop()
            if left == 0 and not start.users and not node.users:
                graph.erase_node(node)
                graph.erase_node(start)
            else:
                inside[-1] += 1
        elif _name(node) == _LOAD and not node.users:
            graph.erase_node(node)
        else:
            inside[-1] += 1

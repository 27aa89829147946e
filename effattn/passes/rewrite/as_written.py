"""Keeps Inductor's attention patterns away from attention that was left alone.

They match a product, a softmax and a product, without checking the softmax's dimension, how the key was transposed, or
what queries without keys give, so they would replace attention that effattn refuses for such reasons. A dimension that
is added to the weights and dropped again prevents the match. It is a view, which Inductor folds into its indexing.
"""

from __future__ import annotations

import torch
from torch import fx

from effattn.errors import RewriteError
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.vocabulary import canonical

# operations that make weights of scores; in a softmax written by hand patterns look for the exponential
_WEIGHTS = {"softmax", "log_softmax", "exp"}


def keep_as_written(gm: fx.GraphModule) -> int:
    """Hide the softmaxes of ``gm`` and its subgraphs from Inductor's patterns. Returns their number."""
    hidden = 0
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        before = hidden
        for node in list(module.graph.nodes):
            call = canonical(node)
            if call is not None and call.name in _WEIGHTS:
                hidden += _hide(module.graph, node)
        if hidden > before:
            module.recompile()
    return hidden


def _hide(graph: fx.Graph, node: fx.Node) -> bool:
    readers = [user for user in node.users if user.op != "output"]  # outputs must not become views
    if not readers or not isinstance(node.meta.get("example_value"), torch.Tensor):
        return False
    with graph.inserting_after(node):
        try:
            insert = Inserter(graph, node)
        except RewriteError:
            return False
        wide = insert.method("unsqueeze", node, 0)
    with graph.inserting_after(wide):
        same = insert.method("squeeze", wide, 0)
    for reader in readers:
        reader.replace_input_with(node, same)
    return True

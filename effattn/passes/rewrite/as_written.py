"""What was left alone stays as the user wrote it: Inductor's patterns of attention pass it by.

They look for a product, a softmax and a product, and do not ask over which dimension the softmax goes, how the key was
turned, or what a row without keys gets: what effattn refuses for such a reason they replace all the same. A dimension
that is added to the weights and dropped again keeps them off; it is a view, which Inductor folds into its index.
"""

from __future__ import annotations

import torch
from torch import fx

from effattn.errors import RewriteError
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.vocabulary import canonical

# what makes weights of scores; a softmax that is written out ends in the exponential that patterns look for
_WEIGHTS = {"softmax", "log_softmax", "exp"}


def keep_as_written(gm: fx.GraphModule) -> int:
    """Hide the softmaxes of ``gm`` and the graphs in it from Inductor's patterns; how many there were."""
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
    readers = [user for user in node.users if user.op != "output"]  # an output stays what it was, not a view of it
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

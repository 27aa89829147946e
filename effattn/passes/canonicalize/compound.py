"""Before matching: decomposes calls that hide an attention in one node, and erases unread weights.

Nothing else is changed: the vocabulary already gives every spelling one name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from effattn.ir.refusal import Why
from effattn.passes.candidate.record import FOUND_AS, Missed, Refused
from effattn.passes.canonicalize import multihead
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.dead_code import erase_orphans, erase_unused_weights
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.view import GraphView


def _decompose_softmin(write: Inserter, node: fx.Node) -> None:
    """``softmin(x)`` is ``softmax(-x)``, as in PyTorch."""
    given = dict(zip(("input", "dim", "_stacklevel", "dtype"), node.args, strict=False)) | node.kwargs
    if not isinstance(given.get("dim"), int):
        raise Refused(Why.ARGUMENTS, "softmin without a constant dim")
    with multihead.as_recorded(node):
        negative = write.method("neg", given["input"])
        result = write.call(F.softmax, negative, dim=given["dim"], dtype=given.get("dtype"))
    result.meta[FOUND_AS] = "softmin"
    node.replace_all_uses_with(result)


# function that Dynamo keeps whole -> function that decomposes it
RULES: dict[Any, Callable[[Inserter, fx.Node], None]] = {
    F.softmin: _decompose_softmin,
    F.multi_head_attention_forward: multihead.decompose,
    torch._transformer_encoder_layer_fwd: multihead.decompose_encoder_layer,
    torch._native_multi_head_attention: multihead.leave_native,
}


class DecomposeCompound(Pass):
    """Decomposes compound calls and erases unread weights."""

    name = "decompose compound calls"
    optional = True

    def apply(self, work: Compilation) -> bool:
        changed, missed = normalize(work.gm)
        work.outcome.missed += missed
        return bool(changed)


def normalize(gm: fx.GraphModule) -> tuple[int, list[Missed]]:
    """Decompose compound calls in place and erase unread weights. Returns (number of changes, calls left alone)."""
    missed: list[Missed] = []
    sources: list[fx.Node] = []
    expanded = 0
    for node in list(gm.graph.nodes):
        rule = RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        inserter = Inserter(gm.graph, node)
        try:
            with gm.graph.inserting_before(node):
                rule(inserter, node)
        except Refused as refused:
            inserter.undo()
            missed.append(Missed.at(node, refused.refusal))
            continue
        sources += node.all_input_nodes
        for user in list(node.users):
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        expanded += 1
    unused = [source for source in dict.fromkeys(sources) if not source.users]
    if unused:  # a mask that is not needed with is_causal
        erase_orphans(GraphView(gm.graph), unused)
    return expanded + erase_unused_weights(gm.graph), missed

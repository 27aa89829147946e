"""How many attentions Inductor's own pattern matcher replaces in a graph, without generating any code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.utils import counters


def replaced_by_inductor(gm: fx.GraphModule, example_inputs: Any) -> int:
    """What Inductor counts as ``fuse_attention`` for this graph of Dynamo's, which stays as it is.

    Everything that Inductor does before it generates code is done: its own passes before autograd, AOTAutograd with its
    decompositions, and the joint graph passes, which hold the patterns.
    """
    from torch._inductor.compile_fx import compile_fx

    def no_code(graph: fx.GraphModule, *_: Any, **__: Any) -> Any:
        return make_boxed_func(graph.forward)

    before = counters["inductor"]["fuse_attention"]
    with torch._functorch.config.patch(enable_autograd_cache=False), torch._inductor.config.patch(freezing=False):
        compile_fx(copy.deepcopy(gm), example_inputs, inner_compile=no_code)
    return counters["inductor"]["fuse_attention"] - before

"""Inserts a call before every site that observes the op's arguments. Nothing is replaced; the model stays dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effattn.passes.compilation import Compilation, Pass
from effattn.passes.rewrite.replacing import Rewriting
from effattn.passes.rewrite.sites import op_arguments


class ObserveSites(Pass):
    """Insert ``observe(number, query, key, value, captures, scalars, numbers)`` at each site.

    ``number`` is the index of the match. The others are the arguments of ``effattn::attend``: query [B, Hq, Nq, D], key
    [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv] after rotary embeddings, grouped heads not expanded, in the dtype of the
    attention's result. The graph must run in Python, since ``observe`` is not an op.
    """

    name = "observe sites"
    needs = ("matches",)

    def __init__(self, observe: Callable[..., Any]):
        self.observe = observe

    def apply(self, work: Compilation) -> bool:
        rewriting = Rewriting(work)
        for number, match in enumerate(work.outcome.matches):
            with rewriting.at(match.nodes) as writer:
                seen = work.graph.call_function(self.observe, (number, *op_arguments(writer, match)))
                seen.meta["example_value"] = None
                work.taken.add(match.nodes.replaced)
        return True

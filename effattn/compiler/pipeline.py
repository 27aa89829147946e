"""The passes in order: the compiler's table of contents. Nothing else orders them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import fx

from effattn import settings
from effattn.compiler import pass_manager
from effattn.compiler.options import Options
from effattn.passes.canonicalize.block_lists import TabulateBlockLists
from effattn.passes.canonicalize.checkpoints import InlineCheckpoints
from effattn.passes.canonicalize.compound import DecomposeCompound
from effattn.passes.canonicalize.mask_buffers import DecomposeMaskBuffers
from effattn.passes.canonicalize.sums_of_weights import DistributeSums
from effattn.passes.canonicalize.weights_by_hand import ContractWeights
from effattn.passes.choose.choice import ChooseForms
from effattn.passes.compilation import Compilation, MakesPass, Outcome, Pass
from effattn.passes.match.find import MatchAttention, may_hold_attention
from effattn.passes.rewrite.observe import ObserveSites
from effattn.passes.rewrite.sites import RewriteSites
from effattn.policy import Policy


class KeepCanonical(Pass):
    """Keep a copy of the graph as it is matched, for ``verify``."""

    name = "keep the canonical graph"

    def apply(self, work: Compilation) -> bool:
        if work.keep_canonical and any(record.changed for record in work.outcome.passes):
            work.outcome.canonical = copy.deepcopy(work.graph)
        return False


# each brings different spellings to one form, and can restore what no site used
CANONICALIZE: tuple[MakesPass, ...] = (
    InlineCheckpoints,
    DecomposeCompound,
    DecomposeMaskBuffers,
    TabulateBlockLists,
    ContractWeights,
    DistributeSums,
    KeepCanonical,
)
MATCH: tuple[MakesPass, ...] = (MatchAttention,)
REPLACE: tuple[MakesPass, ...] = (ChooseForms, RewriteSites)


def run_passes(gm: fx.GraphModule, options: Options, inputs: Sequence[Any] = ()) -> Outcome:
    """Find attention in ``gm`` and rewrite it in place. After an exception the graph is as before.

    ``inputs``: the tensors that the graph is compiled for. Decay tables and mask buffers among them are read.
    """
    if not may_hold_attention(gm.graph):
        return Outcome()
    work = Compilation(
        gm,
        options.policy,
        inputs,
        strict=options.strict,
        target=options.target,
        keep_canonical=options.verify,
    )
    shows = options.trace or settings.current().debug.passes
    return pass_manager.run((*CANONICALIZE, *MATCH, *REPLACE), work, differences=shows)


def observe_sites(gm: fx.GraphModule, observe: Callable[..., Any], inputs: Sequence[Any] = ()) -> Outcome:
    """Find the same sites as :func:`run_passes`, and call ``observe`` at each when the graph runs. Replaces nothing."""
    if not may_hold_attention(gm.graph):
        return Outcome()
    work = Compilation(gm, Policy.of(None), inputs)
    return pass_manager.run((*CANONICALIZE, *MATCH, partial(ObserveSites, observe)), work)

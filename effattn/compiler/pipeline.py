"""The passes in order. This is the table of contents of the compiler."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from effattn.compiler.options import Options
from effattn.passes import checkpoints, differences, mask_buffers
from effattn.passes.check import check
from effattn.passes.choose import Choice, choose
from effattn.passes.draft import Match, Missed
from effattn.passes.graph import GraphView
from effattn.passes.known import Known
from effattn.passes.match import find, mentions_attention
from effattn.passes.match_blocks import find_blocks
from effattn.passes.match_linear import LinearMatch, find_linear, may_hold_linear
from effattn.passes.normalize import normalize
from effattn.passes.rewrite import rewrite
from effattn.passes.rewrite_linear import rewrite_linear

SOURCE = "_dynamo_source"


@dataclass
class Outcome:
    """What the passes did to one graph."""

    matches: list[Match] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    linear: list[LinearMatch] = field(default_factory=list)  # attention without a softmax, all of it replaced
    original: fx.Graph | None = None  # the graph as Dynamo made it; None if nothing was replaced
    normalized: fx.Graph | None = None  # as it was matched; only to verify, and only where it is not the original
    erased: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.linear) or any(choice.route != "keep" for choice in self.choices)


def run_passes(gm: fx.GraphModule, options: Options, inputs: Sequence[Any] = (), distribute: bool = True) -> Outcome:
    """Find attention in ``gm`` and rewrite it in place. On an exception the graph is as it was before.

    ``inputs`` are the tensors that the graph is compiled for; tables of decay and masks in buffers are looked at.
    ``distribute``: products of a sum of attention weights are taken apart, unless that turns out to be of no use.
    """
    outcome = Outcome()
    clock = _Clock(outcome.seconds)
    if not mentions_attention(gm.graph) and not may_hold_linear(gm.graph):
        return outcome
    original = _copy(gm.graph)
    try:
        with clock("normalize"):
            regions = checkpoints.lay_open(gm)
            written_out, left_alone = normalize(gm)
        with clock("mask buffers"):
            masks = mask_buffers.write_out(gm, inputs)
        view = GraphView(gm.graph)
        with clock("differences"):
            products = differences.write_out(view) if distribute else []
        if options.verify and (
            products or regions or written_out or masks or len(gm.graph.nodes) != len(original.nodes)
        ):
            outcome.normalized = copy.deepcopy(gm.graph)
        if products:
            view = GraphView(gm.graph)
        with clock("match"):
            outcome.matches, outcome.missed = find(view)
        outcome.missed += left_alone
        with clock("choose"):
            outcome.choices = choose(outcome.matches, options.policy, strict=options.strict, target=options.target)
        if products and not differences.all_found(products, [c.match for c in outcome.choices if c.route != "keep"]):
            raise _NoUse
        with clock("rewrite"):
            outcome.erased = rewrite(view, outcome.choices)
        if may_hold_linear(gm.graph):
            view = GraphView(gm.graph)
            with clock("match linear"):
                loops, left_loops, seen = find_blocks(view)
                linear, missed = find_linear(view, seen)
            with clock("rewrite"):
                outcome.linear, left, erased = rewrite_linear(view, loops + linear, options.target, Known(view, inputs))
            outcome.missed += left_loops + missed + left
            outcome.erased += erased
        mask_buffers.settle(gm.graph, masks, outcome.changed)
        if regions and not outcome.changed:
            gm.graph = original
            return outcome
        checkpoints.close(gm, regions)
        with clock("check"):
            check(gm.graph, original)
        gm.recompile()
    except _NoUse:
        gm.graph = original
        return run_passes(gm, options, inputs, distribute=False)
    except BaseException:
        gm.graph = original
        raise
    outcome.original = original
    return outcome


class _NoUse(Exception):
    """A product was taken apart, and not all of its parts became sites."""


def _copy(graph: fx.Graph) -> fx.Graph:
    """A copy that can take the graph's place: Inductor asks each input where Dynamo found it."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.find_nodes(op="placeholder"), copied.find_nodes(op="placeholder"), strict=True):
        if hasattr(old, SOURCE):
            setattr(new, SOURCE, getattr(old, SOURCE))
    return copied


class _Clock:
    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *exc: object) -> None:
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start

"""Compares the decay rate of a loop over blocks with its tables, at rewriting and in every call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx

import effattn.runtime.ops.linear  # noqa: F401  (registers torch.ops.effattn.linear)
from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Loop, Refused
from effattn.passes.canonicalize.assumed import Assumed, places_of
from effattn.passes.graph.known_values import Known, Unknown
from effattn.passes.graph.view import GraphView
from effattn.passes.match.anchors.loop import same_size
from effattn.passes.rewrite.replacing import Writer
from effattn.runtime.ops.decay_tables import follow  # importing it registers torch.ops.effattn.checked_decay


def checked(writer: Writer, loop: Loop, rate: fx.Node | None) -> fx.Node | None:
    """The rate, as a node that validates the tables in every call.

    Raises:
        Refused: the tables are not powers of the rate, or their values are unknown.
    """
    tables = (list(loop.rising), list(loop.falling), list(loop.triangles))
    if rate is None or not any(tables):
        return rate
    try:
        fits = bool(follow(writer.known.value(rate), *writer.known.value(tables)))
    except Unknown as unknown:
        raise Refused(Why.DECAY, f"the decay is data that is not known at compile time: {unknown}") from unknown
    if not fits:
        raise Refused(
            Why.DECAY, "the decay tables do not hold the powers of one rate per head: it is not the decay of one state"
        )
    return writer.call(torch.ops.effattn.checked_decay.default, rate, *tables)


def assumed_decays(graph: fx.Graph) -> list[Assumed]:
    """The assumptions of a rewritten graph about the decay tables."""
    op = torch.ops.effattn.checked_decay.default
    if not graph.find_nodes(op="call_function", target=op):
        return []
    kept = copy.deepcopy(graph)  # later passes may change the graph
    view = GraphView(kept)
    return [_assumed(view, check) for check in kept.find_nodes(op="call_function", target=op)]


def _assumed(view: GraphView, check: fx.Node) -> Assumed:
    def holds(*args: Any) -> bool:
        known = Known(view, args)
        try:
            return bool(follow(*known.value(check.args)))
        except Unknown:
            return False

    return Assumed("a table of decay", places_of(view.graph, {check}), holds)


def same_shape(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether shape, dtype and device are equal, as far as Dynamo's guards show."""
    if before.dim() != after.dim():
        return False
    same = all(same_size(one, other) for one, other in zip(before.shape, after.shape, strict=True))
    return same and before.dtype == after.dtype and before.device == after.device

"""The definition of an anchor: where to look for attention, and how to read it from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from effattn.ir.refusal import Refusal, Why
from effattn.passes.candidate.record import Candidate
from effattn.passes.candidate.space import Readers
from effattn.passes.graph.view import GraphView


@dataclass(frozen=True)
class Start:
    """A node from which attention may be read."""

    what: Any  # what the readings get: a call, a product, the turns of a loop
    tells: frozenset[fx.Node] = frozenset()  # nodes that need no report of their own, matched or not


# (graph, Start.what, readers of this graph) -> candidate; raises Refused
Read = Callable[[GraphView, Any, Readers], Candidate]


@dataclass(frozen=True)
class Anchor:
    """One way to write attention.

    Attributes:
        start: returns a start if attention may be read from a node.
        readings: tried in order; the first whose candidate becomes a site is used.
        again: another reading, by the rule of the refusal that remains when all readings are refused.
        truer: returns a refusal, or one that is closer to the cause.
        unspoken: rules whose refusals are not reported, because most code that looks like this is no attention.
    """

    name: str
    start: Callable[[GraphView, fx.Node], Start | None]
    readings: tuple[Read, ...]
    again: Mapping[str, Read] = field(default_factory=dict)
    truer: Callable[[GraphView, Any, Refusal], Refusal] = lambda view, what, refusal: refusal
    unspoken: frozenset[Why] = frozenset()


def called(name: str) -> Callable[[GraphView, fx.Node], Start | None]:
    """Starts at every call to which the vocabulary gives this name."""

    def start(view: GraphView, node: fx.Node) -> Start | None:
        call = view.call(node)
        return Start(call) if call is not None and call.name == name else None

    return start

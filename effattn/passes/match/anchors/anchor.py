"""What an anchor is: where an attention is looked for, and how it is read from there. One file for each kind."""

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
    """A node at which an attention may be found."""

    what: Any  # what is read from there: a call, a product, the turns of a loop
    tells: frozenset[fx.Node] = frozenset()  # nodes of which nothing else is told, whatever becomes of this


# (graph, what a start holds, readers of this graph) -> candidate; raises Refused
Read = Callable[[GraphView, Any, Readers], Candidate]


@dataclass(frozen=True)
class Anchor:
    """One way in which attention is written.

    Attributes:
        start: what stands at a node, if an attention may be read from there.
        readings: tried in this order; the first whose candidate becomes a site is taken.
        again: by the rule that refuses them all, what is tried then.
        truer: a refusal, or a truer one.
        unspoken: rules by which it is refused without a word, as most of what looks like it is something else.
    """

    name: str
    start: Callable[[GraphView, fx.Node], Start | None]
    readings: tuple[Read, ...]
    again: Mapping[str, Read] = field(default_factory=dict)
    truer: Callable[[GraphView, Any, Refusal], Refusal] = lambda view, what, refusal: refusal
    unspoken: frozenset[Why] = frozenset()


def called(name: str) -> Callable[[GraphView, fx.Node], Start | None]:
    """Starts at every call that the vocabulary names so."""

    def start(view: GraphView, node: fx.Node) -> Start | None:
        call = view.call(node)
        return Start(call) if call is not None and call.name == name else None

    return start

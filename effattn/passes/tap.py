"""The tap: before every site a call that sees what its op would receive. Nothing is replaced, the model stays dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from effattn.passes.draft import Match
from effattn.passes.graph import GraphView
from effattn.passes.rewrite import SavedLoads, Writer, op_arguments


def tap(view: GraphView, matches: Sequence[Match], observe: Callable[..., Any]) -> None:
    """Insert ``observe(number, query, key, value, loads, scalars, numbers)`` where each site stands.

    ``number`` is the place in ``matches``; the rest is what ``effattn::attend`` takes: query [B, Hq, Nq, D], key
    [B, Hkv, Nk, D] and value [B, Hkv, Nk, Dv] after rotary embeddings, grouped heads not expanded, in the dtype of the
    attention's result. The graph must run as Python (``rest="eager"``): ``observe`` is no op.
    """
    saved = SavedLoads(view)
    for number, match in enumerate(matches):
        anchors = match.anchors
        with view.graph.inserting_before(anchors.before or anchors.replaced):
            writer = Writer(view, anchors.replaced)
            args = op_arguments(writer, anchors, saved)
            view.graph.call_function(observe, (number, *args))  # without a fake value: nothing reads it

"""What a rewritten graph assumes of tensors that a model keeps: a triangle in a buffer, a decay in tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Assumed:
    """What some inputs of a graph held when it was compiled, and has to hold in every call."""

    what: str  # as a user is told: "a mask in a buffer (bias)"
    inputs: tuple[int, ...]  # their places among the inputs
    holds: Callable[..., bool]  # of all inputs of a call; may wait for the device


def places_of(graph: fx.Graph, wanted: set[fx.Node]) -> tuple[int, ...]:
    """Which inputs of ``graph`` the nodes in ``wanted`` are computed from; tensors only."""
    sources, waiting = set(wanted), list(wanted)
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in sources]
        sources.update(new)
        waiting += new
    found: list[Any] = list(enumerate(graph.find_nodes(op="placeholder")))
    return tuple(n for n, node in found if node in sources and isinstance(node.meta.get("example_value"), torch.Tensor))

"""Assumptions of a rewritten graph about a model's buffers: a causal mask, a decay table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Assumed:
    """What some inputs held when a graph was compiled, and must hold in every call."""

    what: str  # for messages: "a mask in a buffer (bias)"
    inputs: tuple[int, ...]  # positions among the inputs
    holds: Callable[..., bool]  # of all inputs of a call; may synchronise with the device


def places_of(graph: fx.Graph, wanted: set[fx.Node]) -> tuple[int, ...]:
    """Positions of the tensor inputs of ``graph`` that the nodes in ``wanted`` are computed from."""
    sources, waiting = set(wanted), list(wanted)
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in sources]
        sources.update(new)
        waiting += new
    found: list[Any] = list(enumerate(graph.find_nodes(op="placeholder")))
    return tuple(n for n, node in found if node in sources and isinstance(node.meta.get("example_value"), torch.Tensor))

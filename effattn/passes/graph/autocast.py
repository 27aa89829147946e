"""The autocast state at a node: the state Dynamo recorded at the start of the graph, and switches inside the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


@contextmanager
def autocast_at(node: fx.Node) -> Iterator[None]:
    """Enter the autocast state in which ``node`` runs. Only valid while its graph is being compiled."""
    with ExitStack() as stack:
        for enter in node.graph.find_nodes(op="call_function", target=_enter_autocast):
            over = any(user.target is _exit_autocast and user < node for user in enter.users)
            if enter < node and not over:
                device, dtype, enabled, _ = enter.args
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        yield


def is_autocast(node: fx.Node, device: torch.device) -> bool:
    """Whether autocast is enabled for ``device`` at ``node``."""
    with autocast_at(node):
        return torch.is_autocast_enabled(device.type)

"""Autocast where a node stands: what Dynamo found when the graph began, and what the graph itself switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


@contextmanager
def autocast_at(node: fx.Node) -> Iterator[None]:
    """Autocast as it is when ``node`` runs; to be entered while its graph is compiled, as Dynamo calls a backend."""
    with ExitStack() as stack:
        for enter in node.graph.find_nodes(op="call_function", target=_enter_autocast):
            over = any(user.target is _exit_autocast and user < node for user in enter.users)
            if enter < node and not over:
                device, dtype, enabled, _ = enter.args
                stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))
        yield


def is_autocast(node: fx.Node, device: torch.device) -> bool:
    """Whether operations on such a device are cast where ``node`` stands."""
    with autocast_at(node):
        return torch.is_autocast_enabled(device.type)

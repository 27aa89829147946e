"""Random number generators that a graph may draw from, one per device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effattn.lowering.device import HOST, device_type

CPU = torch.device(HOST)


def devices_of(graph: fx.Graph) -> tuple[torch.device, ...]:
    """The CPU and every device of a value in the graph."""
    values = [leaf for node in graph.nodes for leaf in pytree.tree_leaves(node.meta.get("example_value"))]
    found = {value.device for value in values if isinstance(value, torch.Tensor)} - {torch.device("meta")}
    return (CPU, *sorted(found - {CPU}, key=str))


def states(devices: tuple[torch.device, ...]) -> dict[torch.device, torch.Tensor]:
    """The states of the default generators of ``devices``."""
    return {device: _module(device).get_rng_state(*_which(device)) for device in devices}


def restore(saved: Mapping[torch.device, torch.Tensor]) -> None:
    """Restore states, so that the generators draw the same numbers again."""
    for device, state in saved.items():
        _module(device).set_rng_state(state, *_which(device))


def _module(device: torch.device):
    return torch.random if device == CPU else torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device_type(device.type).one_generator else (device,)

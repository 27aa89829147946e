"""The devices of this machine, of any type, as torch reports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from effattn.lowering.device import DEVICE_TYPES, HOST, device_type


def there_are(kind: str) -> bool:
    """Whether this machine has a device of this type."""
    if device_type(kind).on_host:
        return True
    is_available = getattr(getattr(torch, kind, None), "is_available", None)
    return is_available is not None and is_available()


def best_type() -> str:
    """The preferred device type of this machine: the first row of ``DEVICE_TYPES`` that it has."""
    return next(filter(there_are, DEVICE_TYPES))


def name_of(device: str | torch.device) -> str:
    """Torch's name of a device (without an index: the current one); its type if it has no name."""
    device = torch.device(device)
    if device_type(device.type).on_host:
        return device.type
    known = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if known is None else known(device)


def in_use() -> Iterator[Any]:
    """The device modules (``torch.cuda``, ...) that this process has initialised."""
    for kind in DEVICE_TYPES:
        if kind != HOST and there_are(kind):
            module = getattr(torch, kind)
            if not hasattr(module, "is_initialized") or module.is_initialized():
                yield module


def memory_statistics(device: torch.device) -> Any | None:
    """The device module, if it counts the peak of allocated memory; else None."""
    if device_type(device.type).on_host:
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None

"""What torch says of the devices of this machine, whatever their type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from effattn.lowering.device import DEVICE_TYPES, HOST, device_type


def there_are(kind: str) -> bool:
    """Whether this machine has devices of a type, as torch calls it."""
    if device_type(kind).on_host:
        return True
    is_available = getattr(getattr(torch, kind, None), "is_available", None)
    return is_available is not None and is_available()


def best_type() -> str:
    """The first of the types of devices that this machine has."""
    return next(filter(there_are, DEVICE_TYPES))


def name_of(device: str | torch.device) -> str:
    """What torch calls a device, the current one of a type without a number; its type where it has no other name."""
    device = torch.device(device)
    if device_type(device.type).on_host:
        return device.type
    known = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if known is None else known(device)


def in_use() -> Iterator[Any]:
    """The modules of torch (``torch.cuda``, ...) of devices besides the host that this process has used."""
    for kind in DEVICE_TYPES:
        if kind != HOST and there_are(kind):
            module = getattr(torch, kind)
            if not hasattr(module, "is_initialized") or module.is_initialized():
                yield module

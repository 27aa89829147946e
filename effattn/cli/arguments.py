"""What several commands read from their arguments: lists, numbers of tokens, devices."""

from __future__ import annotations

from effattn.errors import EffattnError


class ArgumentError(EffattnError):
    """An argument of a command is invalid."""


def items(text: str) -> list[str]:
    """What stands between commas."""
    return [item.strip() for item in text.split(",") if item.strip()]


def tokens_in(text: str) -> int:
    """The number of tokens in ``4096`` or ``4K``. Raises ArgumentError."""
    number, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not number.isascii() or not number.isdigit():
        raise ArgumentError(f"lengths are whole numbers of tokens, as 4096 or 4K, got {text!r}")
    return int(number) * factor


def device_named(name: str | None) -> str:
    """A device that this machine has; the best one for None. Raises ArgumentError."""
    import torch

    from effattn.runtime.machine import best_type, there_are

    if name is None:
        return best_type()
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ArgumentError(f"there is no device {name!r}; give cpu, cuda or cuda:1") from error
    if not there_are(kind):
        raise ArgumentError(f"the device {name!r} was asked for, but torch sees none here")
    return name

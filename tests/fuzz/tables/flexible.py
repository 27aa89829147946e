"""flex_attention: mods beside what the mask means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mod:
    """``mask(given)`` and ``score(given)`` -> mods or None; ``oracle`` as in :class:`tests.fuzz.tables.masks.Mask`."""

    mask: Callable
    oracle: Callable
    score: Callable = lambda given: None
    data: tuple[str, ...] = ()
    square: bool = False


def _everything(b, h, i, j, given, n):
    return j >= 0


def _causal(given):
    return lambda b, h, i, j: i >= j


MODS: dict[str, Mod] = {
    "nothing": Mod(lambda given: None, _everything),
    "causal": Mod(_causal, lambda b, h, i, j, given, n: j <= i),
    "window": Mod(
        lambda given: lambda b, h, i, j: (i >= j) & (i - j < 4), lambda b, h, i, j, given, n: (j <= i) & (j > i - 4)
    ),
    "prefix": Mod(
        lambda given: lambda b, h, i, j: (j < 5) | (i >= j), lambda b, h, i, j, given, n: (j < 5) | (i >= j)
    ),
    "rows that see nothing": Mod(
        lambda given: lambda b, h, i, j: j + 3 < i, lambda b, h, i, j, given, n: j < i - 3
    ),
    "documents": Mod(
        lambda given: lambda b, h, i, j: (i >= j) & (given["ids"][b, i] == given["ids"][b, j]),
        lambda b, h, i, j, given, n: (i >= j) & (given["ids"][b, i] == given["ids"][b, j]),
        data=("ids",), square=True,
    ),
    "padding": Mod(
        lambda given: lambda b, h, i, j: given["padding"][b, j],
        lambda b, h, i, j, given, n: given["padding"][b, j],
        data=("padding",),
    ),
    "lengths": Mod(
        lambda given: lambda b, h, i, j: (j < given["lengths"][b]) & (j <= i),
        lambda b, h, i, j, given, n: (j < given["lengths"][b]) & (j <= i),
        data=("lengths",),
    ),
    "alibi": Mod(
        _causal, lambda b, h, i, j, given, n: j <= i,
        lambda given: lambda s, b, h, i, j: s + given["slopes"][h] * (j - i), ("slopes",),
    ),
    "soft cap": Mod(_causal, lambda b, h, i, j, given, n: j <= i,
                    lambda given: lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)),
    "bias": Mod(lambda given: None, _everything,
                lambda given: lambda s, b, h, i, j: s + given["bias"][h, i, j], ("bias",)),
    "large factors": Mod(
        lambda given: lambda b, h, i, j: (i * 50_000_017 + j * 7) % 97 < 60,
        lambda b, h, i, j, given, n: (i * 50_000_017 + j * 7) % 97 < 60,
    ),
    "neighbours": Mod(
        lambda given: lambda b, h, i, j: ((i // 5 - j // 5).abs() <= 1) & ((i % 5 - j % 5).abs() <= 1),
        lambda b, h, i, j, given, n: (abs(i // 5 - j // 5) <= 1) & (abs(i % 5 - j % 5) <= 1),
    ),
    "of heads": Mod(
        lambda given: lambda b, h, i, j: (i >= j) & ((h % 2 == 0) | (i - j < 3)),
        lambda b, h, i, j, given, n: (j <= i) & ((h % 2 == 0) | (i - j < 3)),
    ),
    "of sequences": Mod(
        lambda given: lambda b, h, i, j: (i >= j) | (b == 1), lambda b, h, i, j, given, n: (j <= i) | (b == 1)
    ),
    "documents, capped": Mod(
        lambda given: lambda b, h, i, j: given["ids"][b, i] == given["ids"][b, j],
        lambda b, h, i, j, given, n: given["ids"][b, i] == given["ids"][b, j],
        lambda given: lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0), ("ids",), square=True,
    ),
    "bias of keys": Mod(
        _causal, lambda b, h, i, j, given, n: j <= i,
        lambda given: lambda s, b, h, i, j: s + given["key bias"][b, j], ("key bias",),
    ),
    "distances": Mod(
        lambda given: None, _everything,
        lambda given: lambda s, b, h, i, j: s + given["relative"][(i - j).clamp(-7, 7) + 7, h], ("relative",),
    ),
    "scale of heads": Mod(
        _causal, lambda b, h, i, j, given, n: j <= i,
        lambda given: lambda s, b, h, i, j: s * given["slopes"][h], ("slopes",),
    ),
    "mask in the score": Mod(
        lambda given: None, lambda b, h, i, j, given, n: j <= i,
        lambda given: lambda s, b, h, i, j: torch.where(i >= j, s, -float("inf")),
    ),
}  # fmt: skip

"""The source of a selector's pick: a sort a query block, and how many units cover a head's mass."""

from __future__ import annotations

from effattn.lowering.triton.source import template_named, tidy
from effattn.lowering.triton.spec import MIN_TILE, padded

WIDEST = 8192  # units that one program sorts


def generate(width: int, warps: int) -> str:
    """The source of ``rank`` and ``cover`` for rows of up to ``width`` units, a power of two."""
    return tidy(template_named("pick.py.jinja").render(width=width, warps=warps))


def width_for(units: int) -> int:
    return max(padded(units), MIN_TILE)


def warps_for(width: int) -> int:
    return min(max(width // 256, 1), 16)

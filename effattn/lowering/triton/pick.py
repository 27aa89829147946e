"""The source of a selector's pick: a sort a query block, and how many units cover a head's mass."""

from __future__ import annotations

from effattn.lowering.triton.source import Param, template_named, tidy
from effattn.lowering.triton.spec import padded

WIDEST = 8192  # units that one program sorts


def generate(width: int, warps: int) -> str:
    """The source of ``rank`` and ``cover`` for rows of up to ``width`` units, a power of two."""
    return tidy(template_named("pick.py.jinja").render(width=width, warps=warps))


def parameters(kernel: str) -> list[Param]:
    """The parameters of ``rank`` or ``cover``, in order."""
    read, written = {"rank": ("scores", "order"), "cover": ("mass", "counts")}[kernel]
    found = [Param(read, "*fp32"), *(Param(name, "*i32") for name in (written, "firsts", "lasts"))]
    found += [Param("row_blocks", "i32", False), Param("units", "i32", False)]
    if kernel == "rank":
        found.append(Param("kept", "i32", False))
    else:
        found += [Param("gamma", "fp32", False), Param("least", "i32", False)]
    return [*found, Param("sinks", "i32", False), Param("local", "i32", False), Param("WIDTH", "constexpr")]


def width_for(units: int) -> int:
    return padded(units)


def warps_for(width: int) -> int:
    return min(max(width // 256, 1), 16)

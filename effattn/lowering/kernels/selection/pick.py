"""Source of a selector's pick: the best units of a query block, and the number of units that cover a head's mass."""

from __future__ import annotations

from effattn.lowering.kernels.parameters import Param
from effattn.lowering.kernels.rendering import template_named, tidy
from effattn.lowering.kernels.spec import padded

WIDEST = 8192  # most units of one program


def generate(width: int, warps: int) -> str:
    """The source of ``choose`` and ``cover`` for rows of up to ``width`` units, a power of two."""
    return tidy(template_named("pick.py.jinja").render(width=width, warps=warps))


def parameters(kernel: str) -> list[Param]:
    """The parameters of ``choose`` or ``cover``, in order."""
    pointers = {"choose": ("scores", "counts", "order"), "cover": ("mass", "counts")}[kernel]
    found = [Param(pointers[0], "*fp32"), *(Param(name, "*i32") for name in (*pointers[1:], "firsts", "lasts"))]
    if kernel == "choose":
        sizes = ("lists", "counted", "row_blocks", "row_start", "rows", "units", "kept")
        found += [Param(name, "i32", False) for name in sizes]
    else:
        found += [Param("row_blocks", "i32", False), Param("units", "i32", False)]
        found += [Param("gamma", "fp32", False), Param("least", "i32", False)]
    found += [Param("sinks", "i32", False), Param("local", "i32", False), Param("WIDTH", "constexpr")]
    return found + ([Param("SHARING", "constexpr")] if kernel == "choose" else [])


def width_for(units: int) -> int:
    return padded(units)


def warps_for(width: int) -> int:
    """Few warps, since each step of ``choose`` is a reduction over all of them."""
    return max(width // 512, 1)

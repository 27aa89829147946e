"""The portable target: any plan on any device, in ATen, chunk by chunk.

Memory grows with Nq + Nk, not with their product.
"""

from typing import Any

from effattn.runtime.selection import portable_steps as steps
from effattn.runtime.targets.portable import linear
from effattn.runtime.targets.portable.backward import run_backward
from effattn.runtime.targets.portable.forward import run

alone = False


def why_not_on(device: str) -> None:
    """It runs on every device."""


def why_not(spec: Any, dtype: Any, head_dim: int, value_dim: int) -> None:
    """It supports every call."""


def why_no_backward(spec: Any, head_dim: int, value_dim: int, wanted: tuple[str, ...] = ()) -> None:
    """It has a backward for every plan."""


def describe(plan: Any, site: Any) -> str:
    return "portable (ATen, blockwise)"


__all__ = [
    "alone",
    "describe",
    "linear",
    "run",
    "run_backward",
    "steps",
    "why_no_backward",
    "why_not",
    "why_not_on",
]

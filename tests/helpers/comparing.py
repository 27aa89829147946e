"""How tests compare tensors: by what rounding can do to values of that size and type, on whatever processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# What a result may be off by, in units of the last place. Products are summed in the type itself, or in float32 where
# that is half precision.
UNITS = {torch.float64: 4096, torch.float32: 256, torch.float16: 4, torch.bfloat16: 4}


def tolerance_of(dtype: torch.dtype, terms: int = 1) -> float:
    """Relative to the largest value. ``terms``: how many numbers are added up where it is more than a few hundred."""
    return UNITS[dtype] * torch.finfo(dtype).eps * max(1.0, (terms / 256) ** 0.5)


def assert_close(
    actual: Any, expected: Any, tolerance: float | None = None, *, terms: int = 1, exact_dtype: bool = True, **more: Any
) -> None:
    """Every tensor of ``actual`` is the one of ``expected``, NaN and infinities included, up to rounding.

    A tensor may be off by ``tolerance`` times (1 + its largest finite value): what stands beside a large value, or came
    of differences of numbers about 1, is as inexact as these. ``tolerance`` None: by dtype, see :data:`UNITS`.
    ``exact_dtype`` False: ``expected`` is of a wider type, and the type of ``actual`` says what it may be off by.
    """
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    assert len(ours) == len(theirs), f"{len(ours)} results instead of {len(theirs)}"
    for got, want in zip(ours, theirs, strict=True):
        if not isinstance(want, Tensor) or not want.is_floating_point():
            torch.testing.assert_close(got, want, **more)
            continue
        room = (tolerance if tolerance is not None else tolerance_of(got.dtype, terms)) * scale_of(want)
        torch.testing.assert_close(got, want, rtol=0, atol=room, equal_nan=True, check_dtype=exact_dtype, **more)


def scale_of(x: Tensor) -> float:
    """1 + the largest finite value."""
    finite = x.detach()[x.detach().isfinite()].double().abs()
    return 1.0 + (finite.max().item() if finite.numel() else 0.0)

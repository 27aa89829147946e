"""What a mask of the tables is: a spelling in torch, beside what it means, said in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mask:
    """``make(i, j, given)`` -> bool tensor that broadcasts to [B, H, Nq, Nk]; True: the key is seen.

    i: [Nq, 1], j: [1, Nk]; ``given``: the tensors that the function is called with.
    ``oracle(b, h, i, j, given, (Nq, Nk))`` says the same of integer grids.
    ``data``: names of tensors that it reads. ``rows_may_be_empty``: whether data or shape may hide a whole row.
    """

    make: Callable
    oracle: Callable
    data: tuple[str, ...] = ()
    rows_may_be_empty: bool = False
    square: bool = False
    at_most: bool = False  # no more queries than keys
    only_values_tell: bool = False  # what it hides: positions as floats that do not have them all, numbers that wrap

"""Whether whole numbers are the same in the types in which the user's code computes them.

A reading is exact. Code that computes in 32 bits wraps around, and floats round what they cannot count; where either
may happen, a value stays what the user's code makes of it.

Taken for granted: symbolic lengths below 2**22, and data of 64 bits small enough to be multiplied and added. Where it
is not, both the user's code and ours wrap around at 2**64.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.bounds import INTEGERS, UNKNOWN, Interval, around, interval
from effattn.passes.symbolic.reader import Reader, Unreadable

LENGTH = 2**22
DATA = 2**31
# up to where a type of floats has every whole number
COUNTS = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
_BITS_64 = (torch.int64, torch.uint64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bounds_of(reader: Reader, term: Any, dtype: torch.dtype) -> Interval:
    """Between which numbers a term lies that is computed in ``dtype``."""
    symbols = {symbol.name: symbol for symbol in sympy.sympify(term).free_symbols}

    def of_symbol(name: str) -> Interval:
        symbol = symbols[name]
        size = reader.sizes.get(symbol, reader.probed.get(symbol))
        if size is not None:
            return Interval(0, max(_largest(size) - 1, 0))
        if symbol.is_integer is not True:
            return UNKNOWN
        return Interval(0, LENGTH) if symbol.is_nonnegative else around(DATA)

    def of_load(name: str) -> Interval:
        held = reader.dtype_of_capture(name)
        if held in _BITS_64 and dtype in _BITS_64:
            return around(DATA)
        return UNKNOWN if held is None else INTEGERS.get(name_of(held), UNKNOWN)

    return interval(term, of_symbol, of_load)


def _largest(size: Any) -> int | float:
    return interval(size, lambda _: Interval(0, LENGTH), lambda _: UNKNOWN).high


def check_held(reader: Reader, value: Any, dtype: torch.dtype) -> None:
    """Do nothing if ``dtype`` holds ``value`` as it is.

    Raises:
        Unreadable: a whole number may wrap around, or is rounded.
    """
    if dtype.is_floating_point:
        _check_counted(reader, value, dtype)
    elif (limits := INTEGERS.get(name_of(dtype))) is not None and not bounds_of(reader, value, dtype).within(limits):
        raise Unreadable(f"whole numbers may be too large for {dtype}")


def _check_counted(reader: Reader, value: Any, dtype: torch.dtype) -> None:
    if isinstance(value, expr.Where):
        for branch in value.args[1:]:
            _check_counted(reader, branch, dtype)
        return
    # what floats are chosen from, a fill say, is a float already
    choices = [choice for choice in value.atoms(expr.Where) if all(branch.is_number for branch in choice.args[1:])]
    rest = value.xreplace(dict.fromkeys(choices, sympy.Integer(0)))
    if rest.is_number or rest.is_integer is not True or expr.loads_of(rest):
        return  # data that counts is looked at where it is cast and compared
    if bounds_of(reader, rest, dtype).size > COUNTS.get(dtype, 0):
        raise Unreadable(f"{dtype} has not all of the whole numbers that may occur")


def fits(value: int | float, tensor: torch.Tensor | None) -> bool:
    """Whether a Python number is itself in a tensor of integers; true for any number and a tensor of floats."""
    limits = None if tensor is None else INTEGERS.get(name_of(tensor.dtype))
    return limits is None or (value == int(value) and Interval(int(value), int(value)).within(limits))


def check_operands(reader: Reader, values: Iterable[Any], dtype: torch.dtype) -> None:
    """Do nothing if whole numbers are themselves once they are cast to the type in which an operation computes.

    Raises:
        Unreadable: one may not be.
    """
    for value in values:
        if not dtype.is_floating_point or value.is_integer:
            check_held(reader, value, dtype)


def compared_in(reader: Reader, left: Any, right: Any) -> torch.dtype | None:
    """The type in which two operands are compared; None if neither is a tensor.

    A Python number takes the type of the tensor, and so does a tensor of one element without dimensions if both are
    integers: ``int32 < int64`` may be a comparison of 32 bits.
    """
    kinds = [_kind(reader, operand) for operand in (left, right)]
    return None if all(isinstance(kind, type) for kind in kinds) else _promoted(*kinds)


def _kind(reader: Reader, operand: Any) -> tuple[torch.dtype, bool] | type:
    tensor = reader.view.tensor(operand) if isinstance(operand, fx.Node) else None
    if tensor is not None:
        return tensor.dtype, tensor.dim() == 0
    held = reader.view.value(operand) if isinstance(operand, fx.Node) else operand
    return bool if isinstance(held, bool) else int if isinstance(held, (int, torch.SymInt)) else float


@lru_cache(maxsize=256)
def _promoted(left: tuple[torch.dtype, bool] | type, right: tuple[torch.dtype, bool] | type) -> torch.dtype:
    def example(kind):
        return kind(1) if isinstance(kind, type) else torch.empty(() if kind[1] else (1,), dtype=kind[0], device="meta")

    return torch.result_type(example(left), example(right))


def counts(reader: Reader, term) -> bool:
    """Whether a term reads whole numbers that may be larger than a float32 can count."""
    held = (reader.dtype_of_capture(load.name) for load in expr.loads_of(term) if isinstance(load, expr.IntLoad))
    return any(dtype is not None and dtype.itemsize > 2 for dtype in held)

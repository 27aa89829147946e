"""Checks that integers are exact in the dtypes in which user code computes them.

Expressions are exact. 32-bit integers wrap around, and floats round large integers. Where either may happen, the value
becomes a captured tensor.

Assumed: symbolic lengths are below 2**22, and 64-bit data are small enough to be multiplied and added. Otherwise both
user code and kernels wrap around at 2**64.
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
# up to these, a floating-point dtype represents every integer
COUNTS = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
_BITS_64 = (torch.int64, torch.uint64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bounds_of(reader: Reader, term: Any, dtype: torch.dtype) -> Interval:
    """The interval of a term computed in ``dtype``."""
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
    """Check that ``dtype`` holds ``value`` exactly.

    Raises:
        Unreadable: an integer may wrap around or be rounded.
    """
    if dtype.is_floating_point:
        _check_counted(reader, value, dtype)
    elif (limits := INTEGERS.get(name_of(dtype))) is not None and not bounds_of(reader, value, dtype).within(limits):
        raise Unreadable(f"integers may overflow {dtype}")


def _check_counted(reader: Reader, value: Any, dtype: torch.dtype) -> None:
    if isinstance(value, expr.Where):
        for branch in value.args[1:]:
            _check_counted(reader, branch, dtype)
        return
    # the values of a where() of numbers, such as a fill, are floats already
    choices = [choice for choice in value.atoms(expr.Where) if all(branch.is_number for branch in choice.args[1:])]
    rest = value.xreplace(dict.fromkeys(choices, sympy.Integer(0))) if choices else value
    if rest.is_number or rest.is_integer is not True or expr.loads_of(rest):
        return  # integer data are checked where they are cast and compared
    if bounds_of(reader, rest, dtype).size > COUNTS.get(dtype, 0):
        raise Unreadable(f"{dtype} cannot represent all integers that may occur")


def fits(value: int | float, tensor: torch.Tensor | None) -> bool:
    """Whether an integer tensor holds a Python number exactly; True for a floating-point tensor."""
    limits = None if tensor is None else INTEGERS.get(name_of(tensor.dtype))
    return limits is None or (value == int(value) and Interval(int(value), int(value)).within(limits))


def check_operands(reader: Reader, values: Iterable[Any], dtype: torch.dtype) -> None:
    """Check that integers stay exact when cast to the dtype in which an operation computes.

    Raises:
        Unreadable: one may not.
    """
    for value in values:
        if not dtype.is_floating_point or value.is_integer:
            check_held(reader, value, dtype)


def compared_in(reader: Reader, left: Any, right: Any) -> torch.dtype | None:
    """The dtype in which two operands are compared; None if neither is a tensor.

    By torch's type promotion, a Python number takes the tensor's dtype, and so does a 0-d tensor of the same kind:
    ``int32 < int64`` may be a 32-bit comparison.
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
    """Whether a term loads integers of more than 16 bits, which float32 may round."""
    held = (reader.dtype_of_capture(load.name) for load in expr.loads_of(term) if isinstance(load, expr.IntLoad))
    return any(dtype is not None and dtype.itemsize > 2 for dtype in held)

"""The operations of expressions, on Python numbers and on tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import Tensor


def _floordiv(x, y):
    return torch.floor_divide(x, y) if isinstance(x, Tensor) or isinstance(y, Tensor) else x // y


def _mod(x, y):
    return torch.remainder(x, y) if isinstance(x, Tensor) or isinstance(y, Tensor) else x % y


def _is_power_of_two(x):
    return (x > 0) & ((x & (x - 1)) == 0)


def _either(in_torch: Callable, in_python: Callable) -> Callable:
    """A function of one argument, either a tensor or a number."""
    return lambda x: in_torch(x) if isinstance(x, Tensor) else in_python(x)


def _extreme(in_torch: Callable, clamp: str, in_python: Callable) -> Callable:
    """``min`` or ``max`` of two values, each a tensor or a number."""

    def call(x, y):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return in_torch(x, y)
        if isinstance(x, Tensor):
            return x.clamp(**{clamp: y})
        if isinstance(y, Tensor):
            return y.clamp(**{clamp: x})
        return in_python(x, y)

    return call


def _not(x):
    return ~boolean(x) if isinstance(x, Tensor) else not x


def boolean(x):
    return x if not isinstance(x, Tensor) or x.dtype == torch.bool else x != 0


def _and(x, y):
    return boolean(x) & boolean(y) if isinstance(x, Tensor) or isinstance(y, Tensor) else bool(x and y)


def _or(x, y):
    return boolean(x) | boolean(y) if isinstance(x, Tensor) or isinstance(y, Tensor) else bool(x or y)


def _ne(x, y):
    if isinstance(x, Tensor) and x.dtype == torch.bool and not isinstance(y, Tensor) and y == 0:
        return x  # a boolean mask, which is written as mask != 0
    return x != y


def integer(x):
    """Booleans as 0 and 1 for arithmetic."""
    return x.to(torch.int64) if isinstance(x, Tensor) and x.dtype == torch.bool else x


LOGICAL: dict[str, Callable] = {"and": _and, "or": _or, "not": _not, "ne": _ne}
ARITHMETIC: dict[str, Callable] = {
    "add": operator.add,
    "mul": operator.mul,
    "div": operator.truediv,
    "min": _extreme(torch.minimum, "max", min),
    "max": _extreme(torch.maximum, "min", max),
    "abs": abs,
    "group": lambda x: x,
    "floordiv": _floordiv,
    "mod": _mod,
    "bit_and": operator.and_,
    "bit_or": operator.or_,
    "bit_xor": operator.xor,
    "le": operator.le,
    "lt": operator.lt,
    "ge": operator.ge,
    "gt": operator.gt,
    "eq": operator.eq,
    "is_power_of_two": _is_power_of_two,
    "tanh": _either(torch.tanh, math.tanh),
    "exp": _either(torch.exp, math.exp),
    "exp2": _either(torch.exp2, math.exp2),
    "log": _either(torch.log, math.log),
    "sin": _either(torch.sin, math.sin),
    "cos": _either(torch.cos, math.cos),
    "sqrt": _either(torch.sqrt, math.sqrt),
    "sign": _either(torch.sign, lambda x: (x > 0) - (x < 0)),
}

"""Readers of logic, and of the bits of integers."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.elementwise import aligned, pointwise
from effattn.passes.symbolic.reader import Reader, Reading, Unreadable, reads


def _differ(x, y):
    return sympy.Or(sympy.And(x, sympy.Not(y)), sympy.And(sympy.Not(x), y))


def _bit_and(x, y):
    """Masks of low or high bits are remainders, which bounds are known of."""
    for number, mask in ((x, y), (y, x)):
        if mask.is_Integer and _is_power_of_two(mask + 1):
            return expr.Modulo(number, mask + 1)
        if mask.is_Integer and _is_power_of_two(-mask):
            return number - expr.Modulo(number, -mask)
    return expr.BitAnd(x, y)


def _is_power_of_two(number) -> bool:
    return number > 0 and int(number) & (int(number) - 1) == 0


_LOGIC: dict[str, Callable] = {"and": sympy.And, "or": sympy.Or, "xor": _differ, "not": sympy.Not}
_BITS: dict[str, Callable] = {"and": _bit_and, "or": expr.BitOr, "xor": expr.BitXor, "not": lambda x: -x - 1}


@reads(*_LOGIC)
def logic(reader: Reader, call: Call, shape):
    tensor = reader.view.tensor(call.node)
    names = tuple(name for name in ("input", "other") if name in call.args)
    if tensor is None:
        return None
    if tensor.dtype != torch.bool:
        return pointwise(reader, call, shape, names, _BITS[call.name])
    operands = [reader.argument(call, name) for name in names]
    operation = _LOGIC[call.name]
    return Reading(shape, "bool", lambda index: operation(*[o.bool_at(aligned(o, index, shape)) for o in operands]))


@reads("lshift", "rshift")
def shift(reader: Reader, call: Call, shape):
    """By a constant: a product, or a quotient rounded down."""

    def moved(number, places):
        if not (places.is_Integer and 0 <= places < 31):
            raise Unreadable("shifted by what is no constant")
        return number * 2**places if call.name == "lshift" else expr.FloorDiv(number, 2**places)

    return pointwise(reader, call, shape, ("input", "other"), moved)

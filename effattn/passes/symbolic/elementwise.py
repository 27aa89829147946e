"""Readers of arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import aligned, distribute, pointwise
from effattn.passes.symbolic.reader import Reader, Reading, reads
from effattn.passes.symbolic.widths import fits

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "mul": lambda x, y: x * y,
    "neg": lambda x: -x,
    "abs": sympy.Abs,
    "tanh": sympy.tanh,
    "exp": sympy.exp,
    "minimum": sympy.Min,
    "maximum": sympy.Max,
    "rsub": lambda x, y: y - x,
}


@reads(*_ARITHMETIC)
def arithmetic(reader: Reader, call: Call, shape):
    names = ("input", "other") if "other" in call.args else ("input",)
    if reader.view.tensor(call.node) is None:
        return None
    if reader.view.held(call.node).dtype == torch.bool:
        return _of_booleans(reader, call, shape)
    if call.get("alpha", 1) != 1:
        return None
    return pointwise(reader, call, shape, names, _ARITHMETIC[call.name])


@reads("add", "sub")
def add(reader: Reader, call: Call, shape):
    alpha, sign = call.get("alpha", 1), 1 if call.name == "add" else -1
    tensor = reader.view.tensor(call.node)
    if not isinstance(alpha, (int, float)) or tensor is None:
        return None
    if tensor.dtype == torch.bool:
        return _of_booleans(reader, call, shape) if alpha == 1 else None
    factor = sign * alpha
    return pointwise(
        reader,
        call,
        shape,
        ("input", "other"),
        lambda x, y: distribute(operator.add, x, distribute(lambda y: factor * y, y)),
    )


def _of_booleans(reader: Reader, call: Call, shape):
    """A sum or product of booleans is Or or And, as in torch."""
    operation = {"add": sympy.Or, "mul": sympy.And}.get(call.name)
    if operation is None:
        return None
    operands = [reader.argument(call, name) for name in ("input", "other")]
    return Reading(shape, "bool", lambda index: operation(*[o.bool_at(aligned(o, index, shape)) for o in operands]))


@reads("max", "min")
def extremum(reader: Reader, call: Call, shape):
    """max or min of two tensors. A reduction along a dimension is not read."""
    if reader.view.tensor(call.get("other")) is None or "input" not in call.args:
        return None
    if reader.view.tensor(call.node) is None or reader.view.held(call.node).dtype == torch.bool:
        return None
    return pointwise(reader, call, shape, ("input", "other"), sympy.Max if call.name == "max" else sympy.Min)


@reads("div")
def div(reader: Reader, call: Call, shape):
    mode = call.get("rounding_mode")
    if mode == "floor":
        return floordiv(reader, call, shape)
    if mode is not None:
        return None
    divisor = reader.argument(call, "other")
    if divisor.shape == () and divisor.at(()).is_zero:
        return None
    return pointwise(reader, call, shape, ("input", "other"), lambda x, y: x / y)


@reads("floordiv", "mod")
def floordiv(reader: Reader, call: Call, shape):
    divisor = call.get("other")
    if not isinstance(divisor, int) or divisor <= 0 or reader.argument(call, "input").kind != "int":
        return None
    operation = expr.Modulo if call.name == "mod" else expr.FloorDiv
    return pointwise(reader, call, shape, ("input", "other"), operation)


@reads("clamp")
def clamp(reader: Reader, call: Call, shape):
    low, high = call.get("min"), call.get("max")
    if not all(limit is None or isinstance(limit, (int, float)) for limit in (low, high)):
        return None

    def limit(x):
        x = x if low is None else sympy.Max(x, low)
        return x if high is None else sympy.Min(x, high)

    if any(isinstance(number, int) and not fits(number, reader.view.tensor(call.node)) for number in (low, high)):
        return None
    return pointwise(reader, call, shape, ("input",), limit)

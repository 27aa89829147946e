"""Readers of where, masked_fill, tril, triu, casts, and operations that return their input."""

from __future__ import annotations

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call, is_dead_dropout
from effattn.passes.symbolic.pointwise import aligned, exact, stored_as
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, kind_of, reads
from effattn.passes.symbolic.widths import check_held, check_operands, counts


@reads("where")
def where(reader: Reader, call: Call, shape):
    if "input" not in call.args or "other" not in call.args:
        return None
    condition, x, y = (reader.argument(call, name) for name in ("condition", "input", "other"))
    return _select(reader, call, condition, x, y, shape)


@reads("masked_fill")
def masked_fill(reader: Reader, call: Call, shape):
    mask, value, source = (reader.argument(call, name) for name in ("mask", "value", "input"))
    return _select(reader, call, mask, value, source, shape)


def _select(reader: Reader, call: Call, condition: Reading, x: Reading, y: Reading, shape):
    tensor = reader.view.tensor(call.node)
    if tensor is None or tensor.is_complex():
        return None
    kind = kind_of(tensor.dtype)
    if kind == "int" and "float" in (x.kind, y.kind):
        return None  # the fill would be truncated

    def at(index: Index):
        test = condition.bool_at(aligned(condition, index, shape))
        if kind == "bool":
            yes, no = x.bool_at(aligned(x, index, shape)), y.bool_at(aligned(y, index, shape))
            return sympy.Or(sympy.And(test, yes), sympy.And(sympy.Not(test), no))
        values = [operand.number_at(aligned(operand, index, shape)) for operand in (x, y)]
        check_operands(reader, values, reader.computes_in(tensor.dtype, *values))
        return stored_as(expr.Where(test, *values), tensor.dtype)

    return Reading(shape, kind, at)


@reads("tril", "triu")
def triangle(reader: Reader, call: Call, shape):
    source, diagonal = reader.argument(call, "input"), reader.extent(call.get("diagonal", 0))

    def at(index: Index):
        row, column = index[-2:]
        inside = column - row <= diagonal if call.name == "tril" else column - row >= diagonal
        if source.kind == "bool":
            return sympy.And(inside, source.at(index))
        return expr.Where(inside, source.at(index), 0)

    return Reading(shape, source.kind, at)


@reads(
    "to",
    "type_as",
    *(f"cast_{name}" for name in ["float32", "float64", "float16", "bfloat16", "int32", "int64", "bool"]),
)
def cast(reader: Reader, call: Call, shape):
    source, target = reader.view.tensor(call.get("input")), reader.view.tensor(call.node)
    if source is None or target is None:
        return None
    reading = reader.argument(call, "input")
    kind = kind_of(target.dtype)
    if kind == "bool":
        return Reading(shape, "bool", reading.bool_at)
    if kind == "int" and reading.kind == "float":
        return Reading(shape, kind, _cut)
    if target.is_complex():
        return None
    if target.dtype.is_floating_point and target.dtype.itemsize < 2:
        return None  # an 8-bit float changes the value too much to ignore its rounding
    widens = source.dtype == target.dtype
    widens = widens or (source.dtype.is_floating_point and source.dtype.itemsize < target.dtype.itemsize)

    def at(index: Index):
        value = reading.number_at(index)
        if source.dtype == torch.float64 != target.dtype and expr.loads_of(value):
            raise Unreadable("data is rounded from float64")
        if kind == "float" and kind_of(source.dtype) == "int" and not reader.everything and counts(reader, value):
            raise Unreadable("integers may be rounded")
        if kind == "int":
            check_held(reader, value, target.dtype)
            return value
        return stored_as(value if widens else exact(reader, value, target.dtype), target.dtype)

    return Reading(shape, kind, at)


def _cut(index: Index):
    raise Unreadable("a number is converted to an integer, and rounding may change the result")


@reads("identity")
def identity(reader: Reader, call: Call, shape):
    return reader.argument(call, "input")


@reads("dropout")
def dropout(reader: Reader, call: Call, shape):
    return reader.argument(call, "input") if is_dead_dropout(call) else None

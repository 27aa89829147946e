"""Readers of arithmetic, comparison, logic, selection and casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.passes.reading.reader import Index, Reader, Reading, generic_index, kind_of, reads
from effattn.passes.vocabulary import Call

_HALF = (torch.float16, torch.bfloat16)


def aligned(reading: Reading, index: Index, shape: Index) -> Index:
    """The index of an operand broadcast to ``shape``: trailing dimensions align, broadcast ones stay at 0.

    A dimension of size 1 in operand and result alike keeps its index: it may be the one query row of a decode step.
    """
    skip = len(index) - len(reading.shape)
    return tuple(
        sympy.Integer(0) if size == 1 and full != 1 else i
        for size, i, full in zip(reading.shape, index[skip:], shape[skip:], strict=True)
    )


def distribute(function: Callable, *terms):
    """``function`` of terms; applied inside a where() of constants if all else is constant, so that masks stay masks."""
    wheres = [i for i, term in enumerate(terms) if isinstance(term, expr.Where)]
    if len(wheres) == 1:
        at = wheres[0]
        condition, yes, no = terms[at].args
        others = [term for i, term in enumerate(terms) if i != at]
        if all(term.is_number for term in (*others, yes, no)):
            branch = [function(*[value if i == at else term for i, term in enumerate(terms)]) for value in (yes, no)]
            if not any(value is sympy.nan for value in branch):
                return expr.Where(condition, *branch)
    return function(*terms)


def _pointwise(reader: Reader, call: Call, shape, names: tuple[str, ...], function: Callable, kind: str | None = None):
    operands = [reader.argument(call, name) for name in names]
    tensor = reader.view.tensor(call.node)
    result_kind = kind or (kind_of(tensor.dtype) if tensor is not None else "int")

    def at(index: Index):
        return distribute(function, *[operand.number_at(aligned(operand, index, shape)) for operand in operands])

    return Reading(shape, result_kind, at)


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
    if reader.view.tensor(call.node) is None or reader.view.tensor(call.node).dtype == torch.bool:
        return None
    return _pointwise(reader, call, shape, names, _ARITHMETIC[call.name])


@reads("add", "sub")
def add(reader: Reader, call: Call, shape):
    alpha, sign = call.get("alpha", 1), 1 if call.name == "add" else -1
    tensor = reader.view.tensor(call.node)
    if not isinstance(alpha, (int, float)) or tensor is None or tensor.dtype == torch.bool:
        return None
    return _pointwise(reader, call, shape, ("input", "other"), lambda x, y: x + sign * alpha * y)


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
    return _pointwise(reader, call, shape, ("input", "other"), lambda x, y: x / y)


@reads("floordiv", "mod")
def floordiv(reader: Reader, call: Call, shape):
    divisor = call.get("other")
    if not isinstance(divisor, int) or divisor <= 0 or reader.argument(call, "input").kind != "int":
        return None
    operation = expr.Modulo if call.name == "mod" else expr.FloorDiv
    return _pointwise(reader, call, shape, ("input", "other"), operation)


@reads("clamp")
def clamp(reader: Reader, call: Call, shape):
    low, high = call.get("min"), call.get("max")
    if not all(limit is None or isinstance(limit, (int, float)) for limit in (low, high)):
        return None

    def limit(x):
        x = x if low is None else sympy.Max(x, low)
        return x if high is None else sympy.Min(x, high)

    return _pointwise(reader, call, shape, ("input",), limit)


_COMPARISONS = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}


@reads(*_COMPARISONS)
def comparison(reader: Reader, call: Call, shape):
    left, right = reader.argument(call, "input"), reader.argument(call, "other")
    relation = _COMPARISONS[call.name]

    def at(index: Index):
        x, y = left.number_at(aligned(left, index, shape)), right.number_at(aligned(right, index, shape))
        for value, other, flipped in ((x, y, False), (y, x, True)):
            if isinstance(value, expr.Where) and all(term.is_number for term in (*value.args[1:], other)):
                truth = [relation(other, branch) if flipped else relation(branch, other) for branch in value.args[1:]]
                return sympy.Or(sympy.And(value.args[0], truth[0]), sympy.And(sympy.Not(value.args[0]), truth[1]))
        return relation(x, y)

    return Reading(shape, "bool", at)


_LOGIC = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor, "not": sympy.Not}


@reads(*_LOGIC)
def logic(reader: Reader, call: Call, shape):
    tensor = reader.view.tensor(call.node)
    if tensor is None or tensor.dtype != torch.bool:
        return None  # bitwise arithmetic on integers
    operands = [reader.argument(call, name) for name in ("input", "other") if name in call.args]
    operation = _LOGIC[call.name]
    if call.name == "xor":

        def operation(x, y):
            return sympy.Or(sympy.And(x, sympy.Not(y)), sympy.And(sympy.Not(x), y))

    return Reading(shape, "bool", lambda index: operation(*[o.bool_at(aligned(o, index, shape)) for o in operands]))


@reads("where")
def where(reader: Reader, call: Call, shape):
    if "input" not in call.args or "other" not in call.args:
        return None
    condition, x, y = (reader.argument(call, name) for name in ("condition", "input", "other"))
    tensor = reader.view.tensor(call.node)
    kind = kind_of(tensor.dtype) if tensor is not None else "float"
    return _select(condition, x, y, shape, kind)


@reads("masked_fill")
def masked_fill(reader: Reader, call: Call, shape):
    tensor = reader.view.tensor(call.node)
    kind = kind_of(tensor.dtype) if tensor is not None else "float"
    mask, value, source = (reader.argument(call, name) for name in ("mask", "value", "input"))
    return _select(mask, value, source, shape, kind)


def _select(condition: Reading, x: Reading, y: Reading, shape, kind):
    def at(index: Index):
        test = condition.bool_at(aligned(condition, index, shape))
        if kind == "bool":
            yes, no = x.bool_at(aligned(x, index, shape)), y.bool_at(aligned(y, index, shape))
            return sympy.Or(sympy.And(test, yes), sympy.And(sympy.Not(test), no))
        return expr.Where(test, x.number_at(aligned(x, index, shape)), y.number_at(aligned(y, index, shape)))

    return Reading(shape, kind, at)


@reads("to", "type_as", *(f"cast_{name}" for name in ["float32", "float64", "float16", "bfloat16", "int32", "int64", "bool"]))
def cast(reader: Reader, call: Call, shape):
    source, target = reader.view.tensor(call.get("input")), reader.view.tensor(call.node)
    if source is None or target is None:
        return None
    reading = reader.argument(call, "input")
    kind = kind_of(target.dtype)
    if kind == "bool":
        return Reading(shape, "bool", reading.bool_at)
    if kind == "int" and reading.kind == "float":
        return None  # truncation
    if kind == "float" and reading.kind == "int" and target.dtype in _HALF and not _small(reading):
        return None  # positions above 2,048 are rounded in half precision: keep what the author computes
    return Reading(shape, kind, reading.number_at)


def _small(reading: Reading) -> bool:
    """Whether an integer reading is a constant or 0/1, exact in any float type."""
    probe = reading.at(generic_index(len(reading.shape)))
    return probe.is_number or (isinstance(probe, expr.Where) and all(branch.is_number for branch in probe.args[1:]))


@reads("identity")
def identity(reader: Reader, call: Call, shape):
    return reader.argument(call, "input")


@reads("dropout")
def dropout(reader: Reader, call: Call, shape):
    return reader.argument(call, "input") if is_dead_dropout(call) else None


def is_dead_dropout(call: Call) -> bool:
    """Dropout that does nothing: p is 0, or the model is not training."""
    return call.get("p", 0.5) == 0 or call.get("training", True) is False


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

"""Readers of arithmetic, comparison, selection and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call, is_dead_dropout
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, kind_of, reads
from effattn.passes.symbolic.widths import COUNTS, check_held, check_operands, compared_in, fits

_HALF = (torch.float16, torch.bfloat16)
_LARGE = 1000.0  # a score of a few units keeps its digits beside numbers up to here


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
    """``function`` of terms, applied inside a where() if that does not repeat work, so that masks stay masks."""
    wheres = [i for i, term in enumerate(terms) if isinstance(term, expr.Where)]
    if len(wheres) == 1:
        at = wheres[0]
        condition, yes, no = terms[at].args
        branch = [distribute(function, *terms[:at], value, *terms[at + 1 :]) for value in (yes, no)]
        cheap = all(term.is_number for i, term in enumerate(terms) if i != at)
        cheap = cheap or (yes.is_number and no.is_number and any(value.is_number for value in branch))
        if cheap and not any(value.has(sympy.nan) for value in branch):
            return expr.Where(condition, *branch)
    if len(wheres) == len(terms) == 2 and all(_is_small_choice(term) for term in terms):
        (condition, *branches), other = terms[0].args, terms[1]
        chosen = [distribute(function, branch, other) for branch in branches]
        if not any(value.has(sympy.nan) for value in chosen):
            return expr.Where(condition, *chosen)
    return function(*terms)


def _is_small_choice(term) -> bool:
    return all(leaf.is_number for leaf in _leaves(term)) and len(_leaves(term)) <= 4


def stored_as(value, dtype: torch.dtype):
    """``value`` as a tensor of ``dtype`` holds it: constants beyond its range are infinite, also inside a where().

    So are those that are added to something: what a type holds beside them is too small to bring them back.
    """
    if not dtype.is_floating_point:
        return value
    if isinstance(value, expr.Where):
        condition, yes, no = value.args
        return expr.Where(condition, stored_as(yes, dtype), stored_as(no, dtype))
    if isinstance(value, sympy.Add):
        return sympy.Add(*[stored_as(part, dtype) for part in value.args])
    if isinstance(value, sympy.Mul) and len(value.args) == 2 and isinstance(value.args[1], expr.Where):
        factor, choice = value.args
        if factor.is_number and _is_small_choice(choice):
            scaled = distribute(lambda branch: factor * branch, choice)
            if not isinstance(scaled, expr.Where):  # zero times infinity in a branch
                return value
            return value if (held := stored_as(scaled, dtype)) == scaled else held
        return value
    if value.is_number and value.is_finite and value.is_real and abs(value) > torch.finfo(dtype).max:
        held = float(torch.tensor(float(value), dtype=torch.float64).to(dtype))
        return sympy.sympify(held) if abs(held) == float("inf") else value
    return value


def pointwise(reader: Reader, call: Call, shape, names: tuple[str, ...], function: Callable):
    operands = [reader.argument(call, name) for name in names]
    tensor = reader.view.tensor(call.node)
    if tensor is None or tensor.is_complex():
        return None

    def at(index: Index):
        values = [operand.number_at(aligned(operand, index, shape)) for operand in operands]
        value = distribute(function, *values)
        check_operands(reader, values, reader.computes_in(tensor.dtype, value))
        if tensor.dtype.is_floating_point and not value.is_integer:
            value = distribute(function, *[reader.grouped(value) for value in values])
        return stored_as(exact(reader, value, tensor.dtype), tensor.dtype)

    return Reading(shape, kind_of(tensor.dtype), at)


def exact(reader: Reader, value, dtype: torch.dtype):
    """``value`` if computing it in ``dtype`` loses nothing that a reading would keep, and the other way round.

    Scores may be computed more exactly than the user does. A bias or position in half precision may not: rounding
    moves whole columns of a mask, so such a tensor stays what the user's code makes of it. And a reading of
    ``(1 - mask) * -1e4`` would be ``-1e4 + 1e4 * mask``, in which a score loses its last digits.

    Raises:
        Unreadable: the value is to stay data.
    """
    if dtype in _HALF and not _rounds_to_itself(reader, value):
        raise Unreadable("rounded in half precision")
    if dtype.is_floating_point and _swallows(value):
        raise Unreadable("a large number is added to data")
    check_held(reader, value, reader.computes_in(dtype, value))
    return value


def _swallows(value) -> bool:
    if isinstance(value, expr.Where):
        return any(_swallows(branch) for branch in value.args[1:])
    if value.is_number or (value.is_integer and not expr.loads_of(value)):
        return False
    plain = value.xreplace({choice: sympy.Integer(0) for choice in value.atoms(expr.Where)})
    terms = (term for term in sympy.preorder_traversal(plain) if isinstance(term, (sympy.Add, sympy.Mul)))
    terms = (term for term in terms if not term.is_integer or expr.loads_of(term))
    numbers = (n for term in terms for n in term.args if n.is_Number and n.is_finite)
    return any(abs(number) > _LARGE for number in numbers)


def _rounds_to_itself(reader: Reader, value) -> bool:
    if isinstance(value, expr.Where):
        return all(_rounds_to_itself(reader, branch) for branch in value.args[1:])
    of_scores = value.has(expr.s) or any(load.name in reader.raw for load in expr.loads_of(value))
    return value.is_number or of_scores


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
    """A sum or product of booleans, as torch takes them: or, and."""
    operation = {"add": sympy.Or, "mul": sympy.And}.get(call.name)
    if operation is None:
        return None
    operands = [reader.argument(call, name) for name in ("input", "other")]
    return Reading(shape, "bool", lambda index: operation(*[o.bool_at(aligned(o, index, shape)) for o in operands]))


@reads("max", "min")
def extremum(reader: Reader, call: Call, shape):
    """Of two tensors; ``max`` along a dimension stays data."""
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


_COMPARISONS = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}


@reads(*_COMPARISONS)
def comparison(reader: Reader, call: Call, shape):
    left, right = reader.argument(call, "input"), reader.argument(call, "other")
    relation, dtype = _COMPARISONS[call.name], compared_in(reader, call.get("input"), call.get("other"))

    def at(index: Index):
        x, y = left.number_at(aligned(left, index, shape)), right.number_at(aligned(right, index, shape))
        _check_comparable(x, y)
        _check_rounding(reader, call, x, y)
        if dtype is not None:
            check_operands(reader, (x, y), reader.computes_in(dtype, x, y))
        if all(isinstance(term, expr.Where) or term.is_number for term in (x, y)):
            return _decided(relation, x, y)
        return relation(x, y)

    return Reading(shape, "bool", at)


def _decided(relation: Callable, x, y):
    """``relation`` of two choices, one condition after the other."""
    for term, at in ((x, lambda value: _decided(relation, value, y)), (y, lambda value: _decided(relation, x, value))):
        if isinstance(term, expr.Where):
            condition, yes, no = term.args
            return sympy.Or(sympy.And(condition, at(yes)), sympy.And(sympy.Not(condition), at(no)))
    return relation(x, y)


def _check_comparable(x, y) -> None:
    """Comparisons of numbers that are not whole are read only where rounding cannot change their result.

    sympy, besides, takes every load for finite, and decides comparisons with infinity by that.
    """
    for term in (x, y):
        if not (_is_whole(term) or term.is_number or isinstance(term, (expr.Load, expr.Where))):
            raise Unreadable("a comparison that rounding may change")
    values = [leaf for term in (x, y) for leaf in _leaves(term)]
    if any(value.is_infinite for value in values) and not all(value.is_number for value in values):
        raise Unreadable("data is compared with infinity")


def _is_whole(term) -> bool:
    """Whether a term is a whole number, also where it is one of several: a sum over ``where(end, 1, 0)``."""
    if isinstance(term, (sympy.Add, sympy.Mul)):
        return all(_is_whole(part) for part in term.args)
    if isinstance(term, expr.Where):
        return all(_is_whole(branch) for branch in term.args[1:])
    return term.is_integer is True


def _check_rounding(reader: Reader, call: Call, x, y) -> None:
    """A kernel compares floats in float32; PyTorch may compare in float64, or round whole numbers first."""
    held = [reader.view.tensor(call.get(name)) for name in ("input", "other")]
    dtypes = [tensor.dtype for tensor in held if tensor is not None]
    data = [term for term in (x, y) if expr.loads_of(term)]
    if torch.float64 in dtypes and data:
        raise Unreadable("data is compared in float64")
    if any(dtype.is_floating_point for dtype in dtypes) and any(counts(reader, term) for term in data):
        other = [leaf for term in (x, y) if not expr.loads_of(term) for leaf in _leaves(term)]
        if len(data) == 2 or not all(leaf.is_number and abs(leaf) <= COUNTS[torch.float32] for leaf in other):
            raise Unreadable("whole numbers are compared as floats, which may round them")


def counts(reader: Reader, term) -> bool:
    """Whether a term reads whole numbers that may be larger than a float32 can count."""
    held = (reader.dtype_of_capture(load.name) for load in expr.loads_of(term) if isinstance(load, expr.IntLoad))
    return any(dtype is not None and dtype.itemsize > 2 for dtype in held)


def _leaves(term) -> list:
    """What a choice may yield."""
    return [leaf for branch in term.args[1:] for leaf in _leaves(branch)] if isinstance(term, expr.Where) else [term]


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
        return None  # a fill that is truncated

    def at(index: Index):
        test = condition.bool_at(aligned(condition, index, shape))
        if kind == "bool":
            yes, no = x.bool_at(aligned(x, index, shape)), y.bool_at(aligned(y, index, shape))
            return sympy.Or(sympy.And(test, yes), sympy.And(sympy.Not(test), no))
        values = [operand.number_at(aligned(operand, index, shape)) for operand in (x, y)]
        check_operands(reader, values, reader.computes_in(tensor.dtype, *values))
        return stored_as(expr.Where(test, *values), tensor.dtype)

    return Reading(shape, kind, at)


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
        return None  # an 8-bit float is another value, not only a less exact one
    widens = source.dtype == target.dtype
    widens = widens or (source.dtype.is_floating_point and source.dtype.itemsize < target.dtype.itemsize)

    def at(index: Index):
        value = reading.number_at(index)
        if source.dtype == torch.float64 != target.dtype and expr.loads_of(value):
            raise Unreadable("data is rounded from float64")
        if kind == "float" and kind_of(source.dtype) == "int" and not reader.everything and counts(reader, value):
            raise Unreadable("whole numbers may be rounded")
        if kind == "int":
            check_held(reader, value, target.dtype)
            return value
        return stored_as(value if widens else exact(reader, value, target.dtype), target.dtype)

    return Reading(shape, kind, at)


def _cut(index: Index):
    raise Unreadable("a number is cut to a whole one, and rounding may decide to which")


@reads("identity")
def identity(reader: Reader, call: Call, shape):
    return reader.argument(call, "input")


@reads("dropout")
def dropout(reader: Reader, call: Call, shape):
    return reader.argument(call, "input") if is_dead_dropout(call) else None


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

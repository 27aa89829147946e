"""Readers of comparisons and of logical and bitwise operations."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import aligned, leaves, pointwise
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, reads
from effattn.passes.symbolic.widths import COUNTS, check_operands, compared_in, counts

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
    """``relation`` of two constants or choices between constants, as a boolean of their conditions."""
    for term, at in ((x, lambda value: _decided(relation, value, y)), (y, lambda value: _decided(relation, x, value))):
        if isinstance(term, expr.Where):
            condition, yes, no = term.args
            return sympy.Or(sympy.And(condition, at(yes)), sympy.And(sympy.Not(condition), at(no)))
    return relation(x, y)


def _check_comparable(x, y) -> None:
    """Raise Unreadable for a comparison of non-integers whose result may depend on rounding, or of data with infinity.

    sympy assumes that every load is finite and would decide comparisons with infinity.
    """
    for term in (x, y):
        if not (_is_whole(term) or term.is_number or isinstance(term, (expr.Load, expr.Where))):
            raise Unreadable("a comparison that rounding may change")
    values = [leaf for term in (x, y) for leaf in leaves(term)]
    if any(value.is_infinite for value in values) and not all(value.is_number for value in values):
        raise Unreadable("data is compared with infinity")


def _is_whole(term) -> bool:
    """Whether a term is an integer, also inside a where() that sympy does not know to be one: ``where(end, 1, 0)``."""
    if isinstance(term, (sympy.Add, sympy.Mul)):
        return all(_is_whole(part) for part in term.args)
    if isinstance(term, expr.Where):
        return all(_is_whole(branch) for branch in term.args[1:])
    return term.is_integer is True


def _check_rounding(reader: Reader, call: Call, x, y) -> None:
    """Kernels compare floats in float32. Raise Unreadable if user code compares in float64 or rounds integers first."""
    held = [reader.view.tensor(call.get(name)) for name in ("input", "other")]
    dtypes = [tensor.dtype for tensor in held if tensor is not None]
    data = [term for term in (x, y) if expr.loads_of(term)]
    if torch.float64 in dtypes and data:
        raise Unreadable("data is compared in float64")
    if any(dtype.is_floating_point for dtype in dtypes) and any(counts(reader, term) for term in data):
        other = [leaf for term in (x, y) if not expr.loads_of(term) for leaf in leaves(term)]
        if len(data) == 2 or not all(leaf.is_number and abs(leaf) <= COUNTS[torch.float32] for leaf in other):
            raise Unreadable("integers are compared as floats, which may round them")


def _differ(x, y):
    return sympy.Or(sympy.And(x, sympy.Not(y)), sympy.And(sympy.Not(x), y))


def _bit_and(x, y):
    """A mask of the low or high bits becomes a remainder, for which bounds are known."""
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
    """A shift by a constant, as a multiplication or floor division."""

    def moved(number, places):
        if not (places.is_Integer and 0 <= places < 31):
            raise Unreadable("shifted by a number that is not constant")
        return number * 2**places if call.name == "lshift" else expr.FloorDiv(number, 2**places)

    return pointwise(reader, call, shape, ("input", "other"), moved)

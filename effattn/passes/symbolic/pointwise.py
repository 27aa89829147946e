"""Shared by element-wise readers: broadcasting, values as a dtype stores them, and checks of rounding."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, kind_of
from effattn.passes.symbolic.widths import check_held, check_operands

_HALF = (torch.float16, torch.bfloat16)
_LARGE = sympy.Float(1000)  # adding a constant up to this size leaves a score of a few units enough digits


def aligned(reading: Reading, index: Index, shape: Index) -> Index:
    """The index of an operand broadcast to ``shape``: dimensions align from the last, broadcast ones have index 0.

    A dimension of size 1 in both keeps its index, since it may be the single query of a decode step.
    """
    skip = len(index) - len(reading.shape)
    return tuple(
        sympy.Integer(0) if size == 1 and full != 1 else i
        for size, i, full in zip(reading.shape, index[skip:], shape[skip:], strict=True)
    )


def distribute(function: Callable, *terms):
    """Apply ``function``, moved inside a where() if that repeats no work, so that masks remain a where()."""
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


def leaves(term) -> list:
    """The values that a where() chooses from."""
    return [leaf for branch in term.args[1:] for leaf in leaves(branch)] if isinstance(term, expr.Where) else [term]


def _is_small_choice(term) -> bool:
    return all(leaf.is_number for leaf in leaves(term)) and len(leaves(term)) <= 4


@lru_cache
def _most_of(dtype: torch.dtype) -> sympy.Float:
    """The largest finite number of a floating-point dtype."""
    return sympy.Float(torch.finfo(dtype).max)


def stored_as(value, dtype: torch.dtype):
    """``value`` as stored in ``dtype``: constants outside its range become infinite, also inside a where().

    Constant summands do too, since no finite summand of that dtype brings the sum back into range.
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
        if factor.is_number:
            scaled = distribute(lambda branch: factor * branch, choice)
            if not isinstance(scaled, expr.Where):  # zero times infinity in a branch
                return value
            return value if (held := stored_as(scaled, dtype)) == scaled else held
        return value
    if value.is_number and value.is_finite and value.is_real and abs(value) > _most_of(dtype):
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
            grouped = [reader.grouped(value) for value in values]
            if any(group is not value for group, value in zip(grouped, values, strict=True)):
                value = distribute(function, *grouped)
        return stored_as(exact(reader, value, tensor.dtype), tensor.dtype)

    return Reading(shape, kind_of(tensor.dtype), at)


def exact(reader: Reader, value, dtype: torch.dtype):
    """``value``, if it may be read although ``dtype`` rounds.

    Scores may be computed more exactly than in user code. A bias or position in half precision may not: rounding moves
    whole columns of a mask. Nor may ``(1 - mask) * -1e4``, which reads as ``-1e4 + 1e4 * mask``: added to that sum, a
    score loses its last digits.

    Raises:
        Unreadable: the value has to become a captured tensor.
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
    choices = value.atoms(expr.Where)
    plain = value.xreplace(dict.fromkeys(choices, sympy.Integer(0))) if choices else value
    terms = (term for term in sympy.preorder_traversal(plain) if isinstance(term, (sympy.Add, sympy.Mul)))
    terms = (term for term in terms if not term.is_integer or expr.loads_of(term))
    numbers = (n for term in terms for n in term.args if n.is_Number and n.is_finite)
    return any(abs(number) > _LARGE for number in numbers)


def _rounds_to_itself(reader: Reader, value) -> bool:
    if isinstance(value, expr.Where):
        return all(_rounds_to_itself(reader, branch) for branch in value.args[1:])
    of_scores = value.has(expr.s) or any(load.name in reader.raw for load in expr.loads_of(value))
    return value.is_number or of_scores

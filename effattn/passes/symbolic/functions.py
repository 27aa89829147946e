"""Readers of functions of one number, powers, and short sums of products.

Functions of scores are always read. Functions of captured tensors and positions alone are computed once by user code
instead, except in a score_mod or mask_mod, where everything has to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import pointwise
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, kind_of, reads

LONGEST_SUM = 16  # most elements of a dot product or sum
LARGEST_EXPONENT = 8


def _log(x):
    return -sympy.oo if x.is_zero else sympy.log(x)  # the log of a 0/1 mask is a 0/-inf mask


_FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp2": lambda x: sympy.Pow(2, x),
    "log": _log,
    "log2": lambda x: _log(x) / sympy.log(2).evalf(),
    "log1p": lambda x: _log(1 + x),
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "sin": sympy.sin,
    "cos": sympy.cos,
    "sigmoid": lambda x: (1 + sympy.tanh(x / 2)) / 2,
    "relu": lambda x: sympy.Max(x, 0),
    "sign": sympy.sign,
    "square": lambda x: x**2,
    "reciprocal": lambda x: 1 / x,
}


@reads(*_FUNCTIONS)
def function(reader: Reader, call: Call, shape):
    return _where_it_pays(reader, pointwise(reader, call, shape, ("input",), _of_numbers(_FUNCTIONS[call.name])))


@reads("pow")
def power(reader: Reader, call: Call, shape):
    tensor = reader.view.tensor(call.node)
    if tensor is None:
        return None
    whole = kind_of(tensor.dtype) == "int"
    return _where_it_pays(
        reader, pointwise(reader, call, shape, ("input", "exponent"), lambda x, y: _power(x, y, whole))
    )


def _power(base, exponent, whole: bool):
    if exponent.is_number and sympy.sympify(2 * exponent).is_integer:
        exponent = sympy.Rational(int(2 * exponent), 2)
        if exponent.is_Integer and abs(exponent) <= LARGEST_EXPONENT and (exponent >= 0 or not whole):
            return base**exponent
        if abs(exponent) == sympy.Rational(1, 2):
            return base**exponent
    if base.is_number and base.is_positive and not whole:
        return sympy.Pow(base, exponent)
    raise Unreadable("a power of which neither base nor exponent is a small constant")


def _of_numbers(function: Callable) -> Callable:
    def of(x):
        value = sympy.sympify(function(x))
        return sympy.Float(float(value)) if x.is_number and value.is_finite and value.is_real else value

    return of


def _where_it_pays(reader: Reader, reading: Reading | None) -> Reading | None:
    if reading is None or reader.everything:
        return reading

    def at(index: Index):
        value = reading.at(index)
        if value.is_number or value.has(expr.s) or any(load.name in reader.raw for load in expr.loads_of(value)):
            return value
        raise Unreadable("computed once, for all queries that share it")

    return Reading(reading.shape, reading.kind, at)


# -- sums in mods ---------------------------------------------------------------------------------------------------


@reads("dot")
def dot(reader: Reader, call: Call, shape):
    left, right = (reader.argument(call, name) for name in ("input", "other"))
    return _sum(reader, call, left.shape, lambda i: left.number_at((i,)) * right.number_at((i,)))


@reads("sum")
def total(reader: Reader, call: Call, shape):
    """The sum of a captured vector in a score_mod or mask_mod. Other sums are not read."""
    source = reader.argument(call, "input")
    if call.get("dim", -1) not in (-1, 0, (-1,), (0,), [-1], [0]) or call.get("keepdim"):
        return None
    return _sum(reader, call, source.shape, lambda i: source.number_at((i,)))


def _sum(reader: Reader, call: Call, shape: tuple, term: Callable[[sympy.Integer], Any]) -> Reading | None:
    tensor = reader.view.tensor(call.node)
    if not reader.everything or len(shape) != 1 or tensor is None:
        return None

    def at(index: Index):
        if not shape[0].is_Integer or shape[0] > LONGEST_SUM:
            raise Unreadable(f"a sum over {shape[0]} elements for each pair, more than {LONGEST_SUM}")
        return sympy.Add(*[term(sympy.Integer(i)) for i in range(int(shape[0]))])

    return Reading((), kind_of(tensor.dtype), at)

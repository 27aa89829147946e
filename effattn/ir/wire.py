"""Expressions to JSON and back. Decoding builds terms from a closed table and evaluates no code."""

from __future__ import annotations

from typing import Any

import sympy

from effattn.errors import PlanError
from effattn.ir import expr
from effattn.ir.fold import CHAINS, OPERATIONS

_NAMES = {**OPERATIONS, **CHAINS, expr.Table: "table"}
_CLASSES = {name: cls for cls, name in _NAMES.items()}
_KNOWN = {str(symbol): symbol for symbol in (*expr.INDICES, expr.s, expr.Nq, expr.Nk)}
MAX_DEPTH = 200


def encode(term) -> Any:
    """A sympy term as nested lists of JSON values. Raises PlanError for an operation that no target computes."""
    term = sympy.sympify(term)
    if term in (sympy.true, sympy.false):
        return term == sympy.true
    if term.is_Integer:
        return int(term)
    if term.is_Rational:
        return ["rational", int(term.p), int(term.q)]
    if term.is_Number:
        return float(term)
    if term.is_Symbol:
        return term.name if term.name in _KNOWN else ["scalar" if term.is_integer else "number", term.name]
    if isinstance(term, expr.Load):
        kind = "intload" if isinstance(term, expr.IntLoad) else "load"
        return [kind, term.name, *[encode(index) for index in term.indices]]
    if isinstance(term, sympy.Pow):
        return ["pow", encode(term.base), encode(term.exp)]
    if (name := _NAMES.get(type(term))) is not None:
        return [name, *[encode(arg) for arg in term.args]]
    raise PlanError(f"cannot write {type(term).__name__} in {term}: no target can compute it")


def decode(data: Any, depth: int = 0) -> Any:
    """The inverse of :func:`encode`.

    Raises:
        PlanError: the data was not written by :func:`encode`.
    """
    if depth > MAX_DEPTH:
        raise PlanError("expression nested too deeply")
    if isinstance(data, bool):
        return sympy.true if data else sympy.false
    if isinstance(data, int):
        return sympy.Integer(data)
    if isinstance(data, float):
        return sympy.Float(data)
    if isinstance(data, str) and data in _KNOWN:
        return _KNOWN[data]
    if isinstance(data, list) and data and isinstance(data[0], str):
        return _decode_list(data[0], data[1:], depth + 1)
    raise PlanError(f"not an expression: {data!r}")


def _decode_list(head: str, rest: list, depth: int):
    if head in ("scalar", "number", "load", "intload"):
        if not rest or not isinstance(rest[0], str) or not rest[0].isidentifier():
            raise PlanError(f"{head} needs a name, got {rest[:1]!r}")
        if head == "scalar":
            return expr.scalar(rest[0])
        if head == "number":
            return expr.number(rest[0])
        indices = [decode(index, depth) for index in rest[1:]]
        return expr.load(rest[0], indices, integer=head == "intload")
    if head == "rational":
        if len(rest) != 2 or not all(type(part) is int for part in rest) or rest[1] == 0:
            raise PlanError(f"not a rational: {rest!r}")
        return sympy.Rational(*rest)
    args = [decode(arg, depth) for arg in rest]
    if head == "pow" and len(args) == 2:
        return sympy.Pow(*args)
    if head in _CLASSES:
        try:
            return _CLASSES[head](*args)
        except (TypeError, ValueError) as error:
            raise PlanError(f"bad arguments for {head}: {error}") from error
    raise PlanError(f"unknown operation {head!r}; known: {', '.join(sorted(_CLASSES))}")

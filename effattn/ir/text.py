"""Predicates and scores as readable text: ``k <= q & q - k < 4096 & padding[b, k]``."""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter

from effattn.ir import expr

_FLIPPED = {sympy.Ge: (sympy.Le, "<="), sympy.Gt: (sympy.Lt, "<")}
_SIGNS = {sympy.Le: "<=", sympy.Lt: "<", sympy.Eq: "==", sympy.Ne: "!="}
_BITS = {expr.BitAnd: "&", expr.BitOr: "|", expr.BitXor: "^"}
_FEW_DIGITS = 8
_FEW_VALUES = 8  # how many values of a table are shown


class _Printer(StrPrinter):
    def _print_Load(self, term):
        return f"{term.name}[{', '.join(map(self._print, term.indices))}]" if term.indices else term.name

    _print_IntLoad = _print_Load

    def _print_FloorDiv(self, term):
        return f"{self._operand(term.args[0])}//{self._operand(term.args[1])}"

    def _print_Modulo(self, term):
        return f"{self._operand(term.args[0])}%{self._operand(term.args[1])}"

    def _print_BitAnd(self, term):
        return f"({self._operand(term.args[0])} {_BITS[type(term)]} {self._operand(term.args[1])})"

    _print_BitOr = _print_BitXor = _print_BitAnd

    def _print_Table(self, term):
        shown = [self._print(value) for value in term.values[:_FEW_VALUES]]
        more = ["..."] if len(term.values) > _FEW_VALUES else []
        return f"[{', '.join([*shown, *more])}][{self._print(term.index)}]"

    def _print_Group(self, term):
        return f"({self._print(term.args[0])})"

    def _operand(self, term):
        plain = term.is_Symbol or term.is_Number or isinstance(term, expr.Bits)
        return self._print(term) if plain else f"({self._print(term)})"

    def _print_IsPowerOfTwo(self, term):
        return f"is_power_of_two({self._print(term.args[0])})"

    def _print_Float(self, term):
        return f"{float(term):.{_FEW_DIGITS}g}"

    def _print_And(self, term):
        parts = sorted(term.args, key=_reading_order)
        return " & ".join(f"({self._print(p)})" if isinstance(p, sympy.Or) else self._print(p) for p in parts)

    def _print_Or(self, term):
        parts = sorted(term.args, key=_reading_order)
        return " | ".join(f"({self._print(p)})" if isinstance(p, sympy.And) else self._print(p) for p in parts)

    def _print_Not(self, term):
        return f"~({self._print(term.args[0])})"

    def _print_Relational(self, term):
        left, right = term.args
        if isinstance(term, sympy.Ne) and right == 0 and isinstance(left, expr.IntLoad):
            return self._print(left)
        if isinstance(term, sympy.Eq) and right == 0 and isinstance(left, expr.IntLoad):
            return "~" + self._print(left)
        kind = type(term)
        if kind in _FLIPPED:
            left, right = right, left
            kind = _FLIPPED[kind][0]
        return f"{self._print(left)} {_SIGNS[kind]} {self._print(right)}"

    _print_LessThan = _print_StrictLessThan = _print_GreaterThan = _print_StrictGreaterThan = _print_Relational
    _print_Equality = _print_Unequality = _print_Relational


def _reading_order(term) -> tuple:
    """Sort key: causality first, then windows, then captured tensors, then the rest."""
    relational = isinstance(term, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt))
    return (bool(expr.loads_of(term)) and not relational, isinstance(term, sympy.Or), sympy.count_ops(term), str(term))


def text(term) -> str:
    """``term`` on one line; ``true`` for a predicate without conditions."""
    return "true" if term == sympy.true else _Printer({"order": "none"}).doprint(term)

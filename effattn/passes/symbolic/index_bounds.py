"""Arithmetic on bounded indices: views map indices by sums, quotients and remainders."""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr


class IndexBounds:
    """``sizes`` maps nonnegative index symbols to exclusive upper bounds."""

    def __init__(self, sizes: dict[sympy.Symbol, sympy.Expr] | None = None):
        self.sizes = sizes or {}

    def upper_bound(self, term) -> sympy.Expr | None:
        """An inclusive upper bound of a sum of nonnegative multiples of bounded symbols; None for other terms."""
        total = sympy.Integer(0)
        for part in sympy.Add.make_args(sympy.expand(term)):
            factor, symbol = part.as_coeff_Mul()
            free = [s for s in part.free_symbols if s in self.sizes]
            if not free:
                if part.is_nonnegative is not True:
                    return None
                total += part
                continue
            if isinstance(symbol, expr.Modulo) and factor.is_nonnegative:
                total += factor * (symbol.args[1] - 1)
                continue
            if len(free) != 1:
                return None
            coefficient = sympy.Poly(part, free[0]).coeff_monomial(free[0]) if part.is_polynomial(free[0]) else None
            if coefficient is None or part != coefficient * free[0] or coefficient.is_nonnegative is not True:
                return None
            total += coefficient * (self.sizes[free[0]] - 1)
        return sympy.expand(total)

    def nonnegative(self, term) -> bool:
        """Whether a term is known to be nonnegative: ``q - k + N`` with k < N, a clamped distance plus its limit."""
        low = self.lower_bound(term)
        return low is not None and sympy.expand(low).is_nonnegative is True

    def lower_bound(self, term) -> sympy.Expr | None:
        """An inclusive lower bound of an integer; None if unknown."""
        parts = sympy.Add.make_args(sympy.expand(term))
        if len(parts) > 1:
            bounds = [self.lower_bound(part) for part in parts]
            return None if None in bounds else sympy.Add(*bounds)
        (part,) = parts
        factor, inner = part.as_coeff_Mul()
        if not part.free_symbols & set(self.sizes) and not expr.loads_of(part):
            return part
        if factor.is_negative:
            return factor * (self.sizes[inner] - 1) if inner in self.sizes else None
        if isinstance(inner, (sympy.Max, sympy.Min, expr.Where)):
            choices = inner.args[1:] if isinstance(inner, expr.Where) else inner.args
            bounds = [bound for choice in choices if (bound := self.lower_bound(choice)) is not None]
            if bounds and isinstance(inner, sympy.Max):
                return factor * sympy.Max(*bounds)
            return factor * sympy.Min(*bounds) if len(bounds) == len(choices) else None
        return sympy.Integer(0) if part.is_nonnegative else None

    def below(self, term, size) -> bool:
        """Whether 0 <= term < size is known to hold."""
        top = self.upper_bound(term)
        return top is not None and sympy.expand(size - 1 - top).is_nonnegative is True

    def divide(self, term, size) -> tuple[Any, Any]:
        """(quotient, remainder) of a nonnegative term by a positive size, simplified where bounds allow."""
        term, size = sympy.expand(term), sympy.sympify(size)
        if size == 1:
            return term, sympy.Integer(0)
        term = recombined(term)
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for part in sympy.Add.make_args(term):
            ratio = sympy.cancel(part / size)
            if ratio.is_integer and not sympy.denom(ratio).free_symbols and sympy.denom(ratio) == 1:
                whole += ratio
            else:
                rest += part
        if self.below(rest, size):
            return whole, rest
        return whole + expr.FloorDiv(rest, size), expr.Modulo(rest, size)


def recombined(term):
    """Simplify ``x // n * n + x % n`` to x, as after splitting and merging a dimension."""
    for part in sympy.Add.make_args(term):
        factor, inner = part.as_coeff_Mul()
        if isinstance(inner, expr.Modulo):
            number, size = inner.args
            whole = factor * size * expr.FloorDiv(number, size)
            if sympy.expand(term - part - whole).has(inner) is False and whole in sympy.Add.make_args(term):
                return recombined(sympy.expand(term - part - whole + factor * number))
    return term

"""The meaning of weights without a softmax: ``scale * s * decay^(q - k)`` for k <= q, and 0 for later keys."""

from __future__ import annotations

from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.expr import b, h, k, q, s
from effattn.ir.linear import LinearSpec
from effattn.ir.refusal import Why
from effattn.ir.text import text
from effattn.passes.candidate.record import Refused
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic import Reader

_AGE = sympy.Symbol("age", integer=True, nonnegative=True)  # q - k of a key up to the query, k - q - 1 of a later one


def interpret(weights: Any) -> LinearSpec:
    """The meaning of ``weights``, a term in s and the indices.

    Raises:
        Refused: it is attention with a causal mask or decay that the op does not compute, or (``Why.NOT_ATTENTION``)
            no attention at all.
    """
    weights = sympy.sympify(weights).replace(expr.Group, lambda inside: inside)  # only positions are subtracted below
    if not weights.has(q, k):
        return LinearSpec(_constant(_per_score(weights, not_attention("a product that nothing masks"))), None, False)
    past, future = (_at(weights, where) for where in (q - _AGE, q + 1 + _AGE))
    if future != 0:
        if future.has(s) and _masks_some(weights) and _at_most_zero_beyond(future):
            raise Refused(
                Why.MASKED_WEIGHTS,
                f"masked weights are {text(future)}, which may not be 0",
                "mask after the exp()",
            )
        if any(decay.has(k) for decay in weights.atoms(sympy.exp)):
            raise Refused(Why.BOTH_DIRECTIONS, "keys after the query have weights that depend on their distance")
        raise not_attention("keys after the query have weights as well")
    if past.has(q, k, b):
        raise Refused(Why.WEIGHTS, f"the weights depend on more than distance and head: {text(past)}")
    factor = _per_score(past, Refused(Why.WEIGHTS, f"the weights are not a multiple of the scores: {text(past)}"))
    rate, scale = _split(factor)
    if rate.is_number and rate.is_positive:
        raise Refused(Why.DECAY, f"weights grow with distance: exp({text(rate)}) per token")
    return LinearSpec(_constant(scale), None if rate == 0 else rate, True)


def _at(weights: Any, key: Any) -> Any:
    """The weights at key position ``key``, with conditions decided."""
    return sympy.expand(weights.xreplace({k: key}), power_base=False, power_exp=False, log=False, multinomial=False)


def _masks_some(weights: Any) -> bool:
    return any(relation.has(q) and relation.has(k) for relation in weights.atoms(sympy.Rel))


def _at_most_zero_beyond(future: Any) -> bool:
    """Whether the weight of a later key is 0 except for the sign of data: exp(-inf * slope)."""
    return future.has(sympy.oo) or future.has(-sympy.oo)


def _per_score(term: Any, otherwise: Refused) -> Any:
    """c if ``term`` is ``c * s``."""
    factor = term.xreplace({s: sympy.Integer(1)})
    if not term.has(s) or sympy.expand(term - factor * s) != 0:
        raise otherwise
    return factor


def _split(factor: Any) -> tuple[Any, Any]:
    """(rate, scale) if ``factor`` is ``scale * exp(rate * age)``."""
    exponent, scale = sympy.Integer(0), sympy.Integer(1)
    for part in sympy.Mul.make_args(factor):
        if isinstance(part, sympy.exp):
            exponent += part.args[0]
        elif isinstance(part, sympy.Pow) and part.exp.has(_AGE):
            exponent += part.exp * sympy.log(part.base)
        else:
            scale *= part
    exponent = sympy.expand(exponent)
    rate = exponent.coeff(_AGE, 1)
    rest = sympy.expand(exponent - rate * _AGE)
    if rest.has(_AGE) or scale.has(_AGE) or rate.has(_AGE):
        raise Refused(Why.DECAY, f"the weights are no power of the distance: {text(factor)}")
    return rate, scale * sympy.exp(rest)


def _constant(scale: Any) -> float:
    if not scale.is_number or not scale.is_finite:
        what = "each head has a factor of its own" if scale.has(h) else "the scores are multiplied by data"
        raise Refused(Why.SCALE, f"{what}: {text(scale)}", "multiply the query instead")
    return float(scale)


def not_attention(what: str) -> Refused:
    """The refusal of two products in a row that are no attention: any model code may have them."""
    return Refused(Why.NOT_ATTENTION, what)


def decay_of(view: GraphView, reader: Reader, rate: Any, end: int) -> Any:
    """The rate as one number per head: loads use index 0 in dimensions of size 1, as in slopes [1, H, 1, 1].

    Raises:
        Refused: a captured tensor of the rate needs a gradient at ``end``.
    """
    swap = {}
    for load in expr.loads_of(rate):
        node = reader.captures[load.name].node
        if view.gradient_flows(end) and view.held(node).requires_grad:
            raise Refused(Why.GRADIENT_OF_DECAY, "decay is learned: it needs a gradient, which the op does not compute")
        indices = [sympy.Integer(0) if n == 1 else i for i, n in zip(load.indices, view.shape(node), strict=True)]
        swap[load] = expr.load(load.name, indices, integer=isinstance(load, expr.IntLoad))
    return rate.xreplace(swap)

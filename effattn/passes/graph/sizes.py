"""Comparison of symbolic sizes from Dynamo's guards and ranges, without adding guards.

Different terms may still be equal, and a term other than 1 may be 1. So each answer is True, False, or None if unknown.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions

from effattn.ir import expr
from effattn.passes.graph.view import GraphView, known


def equal(view: GraphView, one: Any, other: Any) -> bool | None:
    """Whether two sizes (terms of :meth:`GraphView.shape`) are equal in every call of the graph."""
    one, other = sympy.sympify(one), sympy.sympify(other)
    if sympy.expand(one - other) == 0:
        return True
    if one.is_Integer and other.is_Integer:
        return False
    env = _shape_env(view)
    if env is None:
        return None
    if known(env, sympy.Eq(_in_their_words(one), _in_their_words(other))):
        return True
    return False if known(env, sympy.Ne(_in_their_words(one), _in_their_words(other))) else None


def is_broadcast(view: GraphView, size: Any, full: Any) -> bool | None:
    """Whether a dimension of ``size`` is broadcast to ``full``, in an operation that accepts 1 or ``full``.

    False also if ``size`` cannot be 1: it then has to be ``full``.
    """
    if equal(view, size, full):
        return False
    return equal(view, size, 1)


def _shape_env(view: GraphView) -> ShapeEnv | None:
    for node in view.graph.nodes:
        for value in (view.value(node), *getattr(view.tensor(node), "shape", ())):
            if isinstance(value, torch.SymInt):
                return value.node.shape_env
    return None


def _in_their_words(term: Any) -> Any:
    """A size in torch's own symbolic functions; the inverse of :func:`effattn.passes.graph.view.as_sympy`."""
    return term.replace(expr.FloorDiv, functions.FloorDiv).replace(expr.Modulo, functions.Mod)

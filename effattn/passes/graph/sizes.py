"""Symbolic sizes compared: what Dynamo's guards and ranges tell, without a guard of our own.

Two sizes that are not the same term may be equal all the same, and a term that is not 1 may be 1. Each question here
has three answers: yes, no, and None where nothing tells.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy import functions

from effattn.ir import expr
from effattn.passes.graph.view import GraphView


def equal(view: GraphView, one: Any, other: Any) -> bool | None:
    """Whether two sizes, terms of :meth:`GraphView.shape`, are equal in every call that the graph serves."""
    one, other = sympy.sympify(one), sympy.sympify(other)
    if sympy.expand(one - other) == 0:
        return True
    if one.is_Integer and other.is_Integer:
        return False
    env = _shape_env(view)
    if env is None:
        return None
    if _known(env, sympy.Eq(_in_their_words(one), _in_their_words(other))):
        return True
    return False if _known(env, sympy.Ne(_in_their_words(one), _in_their_words(other))) else None


def is_broadcast(view: GraphView, size: Any, full: Any) -> bool | None:
    """Whether a dimension of ``size`` is one element for all ``full``, where the operation asks for 1 or ``full``.

    False also where ``size`` cannot be 1, whatever its name: then it has to be ``full``.
    """
    if equal(view, size, full):
        return False
    return equal(view, size, 1)


def _known(env: ShapeEnv, condition: Any) -> bool:
    if condition in (sympy.true, sympy.false):
        return condition == sympy.true
    return statically_known_true(env.create_symboolnode(condition))


def _shape_env(view: GraphView) -> ShapeEnv | None:
    for node in view.graph.nodes:
        for value in (view.value(node), *getattr(view.tensor(node), "shape", ())):
            if isinstance(value, torch.SymInt):
                return value.node.shape_env
    return None


def _in_their_words(term: Any) -> Any:
    """A size in torch's own symbolic functions, as :func:`effattn.passes.graph.view.as_sympy` found it."""
    return term.replace(expr.FloorDiv, functions.FloorDiv).replace(expr.Modulo, functions.Mod)

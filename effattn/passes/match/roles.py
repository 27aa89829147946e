"""Which operand of the products is query, key or value, and what stands behind each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
from torch import fx

from effattn.ir.expr import b, h, k, q
from effattn.ir.refusal import Why
from effattn.ir.text import text
from effattn.passes.candidate.operands import Operand, depth, row, trace
from effattn.passes.candidate.record import Refused, ScoreSpace, require_fixed
from effattn.passes.graph.contraction import Contraction
from effattn.passes.graph.provenance import user_name
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.heads import digits_of


def traced(
    view: GraphView, node: fx.Node, index: tuple, time: int, name: str, sizes: tuple, dtype=None, whole: bool = False
) -> Operand:
    """The operand behind ``node``. Raises Refused if its dimensions are not clearly batch, head, row and depth."""
    batch, heads, length, width = sizes
    bounds = Reader(view, {b: batch, h: heads, row: length, depth: width})
    found = trace(view, bounds, node, index, time, dtype, whole=whole or name == "query")
    if found is None:
        raise Refused(
            Why.OPERANDS,
            f"the layout of {name} is not understood: {user_name(node)} is read at [{', '.join(map(text, index))}]",
            at=None if node.op == "placeholder" else node,
        )
    return found


def folded_alike(view: GraphView, read: Callable[[bool], tuple[Any, ...]]) -> tuple[Any, ...]:
    """``read(whole)``, with query, key and value first. Heads are folded back only if key and value both allow it."""
    found = read(False)
    return found if found[1].heads_in(view) == found[2].heads_in(view) else read(True)


def notes_of_folding(operands: Sequence[Operand]) -> tuple[str, ...]:
    notes: list[str] = []
    if any(what in operand.folded for operand in operands[1:] for what in ("expand", "repeat_interleave")):
        notes.append("grouped heads folded back: key and value are not expanded")
    if any("scale" in operand.folded for operand in operands):
        notes.append("scale on query or key moved to the score")
    return tuple(notes)


def sides(product: Contraction, inside: tuple) -> tuple[str, str] | None:
    at = dict(zip(product.out_labels, inside, strict=True))
    has = {
        side: {x for label in labels if label in at for x in sympy.sympify(at[label]).free_symbols}
        for side, labels in (("left", product.left_labels), ("right", product.right_labels))
    }
    for query, key in (("left", "right"), ("right", "left")):
        if q in has[query] and k not in has[query] and k in has[key] and q not in has[key]:
            return query, key
    return None


def operand_index(view: GraphView, node: fx.Node, labels: tuple, at: dict[str, Any], rename: dict) -> tuple:
    """The index of an operand. Dimensions of size 1 are broadcast."""
    sizes = view.shape(node)
    own = (*rename, depth)  # the operand's own row and head_dim are never broadcast
    return tuple(
        sympy.Integer(0) if size == 1 and at[label] not in own else sympy.sympify(at[label]).xreplace(rename)
        for label, size in zip(labels, sizes, strict=True)
    )


def head_dim_of(view: GraphView, product: Contraction) -> Any:
    """The number of summands of each element of the product."""
    sizes = view.shape(product.left)
    return sympy.Mul(*(sizes[product.left_labels.index(label)] for label in product.sums))


def depths_of(view: GraphView, product: Contraction) -> dict[str, Any]:
    """The index of each summed dimension as a digit of depth. Raises Refused if a size is symbolic."""
    sizes = [view.shape(product.left)[product.left_labels.index(label)] for label in product.sums]
    require_fixed(1, *sizes[1:])
    return dict(zip(product.sums, digits_of(depth, sizes), strict=True))


def query_and_key(
    view: GraphView,
    product: Contraction,
    roles: tuple[str, str],
    inside: tuple,
    space: ScoreSpace,
    dtype,
    whole: bool = False,
) -> list[Operand]:
    """Query and key as (B, H, N, D) operands, from the product whose result is read at the index ``inside``."""
    width, lengths = head_dim_of(view, product), (space.q_len, space.k_len)
    at = {**dict(zip(product.out_labels, inside, strict=True)), **depths_of(view, product)}
    operands = []
    for name, side, length, free in zip(("query", "key"), roles, lengths, (q, k), strict=True):
        node, labels = product.operand(side)
        entries = operand_index(view, node, labels, at, {free: row})
        time = view.time[product.node]
        sizes = (space.batch, space.heads, length, width)
        operands.append(traced(view, node, entries, time, name, sizes, dtype, whole))
    return operands


def value_of(
    view: GraphView, product: Contraction, weights: fx.Node, index: tuple, space: ScoreSpace, whole: bool = False
) -> tuple[Operand, tuple[Any, ...]]:
    """Value as an operand, and the index of the product's result. ``index``: that of ``weights``, its other operand."""
    side = "left" if product.left is weights else "right"
    labels = product.operand(side)[1]
    node, value_labels = product.operand("right" if side == "left" else "left")
    at: dict[str, Any] = dict(zip(labels, index, strict=True))
    if len(product.sums) != 1 or at[product.sums[0]] != k:
        raise Refused(Why.VALUE, "the product after softmax does not run over the keys alone", at=product.node)
    widths = [label for label in value_labels if label not in at]
    if not widths:
        raise Refused(Why.VALUE, "value has no dimension of its own", at=product.node)
    sizes_of_value = [view.shape(node)[value_labels.index(label)] for label in widths]
    require_fixed(sympy.Mul(*sizes_of_value[1:]))
    at.update(zip(widths, digits_of(depth, sizes_of_value), strict=True))
    entries = operand_index(view, node, value_labels, at, {k: row})
    of_weights = dict(zip(labels, view.shape(weights), strict=True))
    for label, entry, size in zip(value_labels, entries, view.shape(node), strict=True):
        if of_weights.get(label) == 1 != size and entry != b:
            raise Refused(Why.HEADS, f"value has {size} heads where the weights have one", at=product.node)
    sizes = (space.batch, space.heads, space.k_len, sympy.Mul(*sizes_of_value))
    value = traced(view, node, entries, view.time[product.node], "value", sizes, whole=whole)
    return value, tuple(at[label] for label in product.out_labels)

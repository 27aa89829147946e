"""The space of scores: which dimensions are batch, heads, queries and keys, with one reader per space."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy

from effattn.ir.expr import b, h, k, q
from effattn.passes.candidate.record import ScoreSpace, require_fixed
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.heads import digits_of

Readers = dict[tuple, Reader]  # the readers of one graph, by space
Leading = tuple[tuple[Any, ...], Any, Any]  # (index of each batch or head dimension in b and h, batch size, heads)


def score_space(
    view: GraphView,
    readers: Readers,
    shape: Sequence[Any],
    rows: tuple[int, int] = (-2, -1),
    leading: Leading | None = None,
    *,
    alone: Collection[int] = (),
    products: bool = False,
    kind: type[Reader] = Reader,
) -> ScoreSpace:
    """The space of scores of ``shape``. ``rows``: the dimensions of queries and keys.

    Args:
        leading: of the other dimensions; default: :func:`batch_index`.
        alone: dimensions that the query has and the key has not.
        products: the reader stops at products.
        kind: the class of the reader.
    """
    q_dim, k_dim = (dim % len(shape) for dim in rows)
    rest = [dim for dim in range(len(shape)) if dim not in (q_dim, k_dim)]
    entries, batch, heads = leading or batch_index([shape[n] for n in rest], [n in alone for n in rest])
    at = {**dict(zip(rest, entries, strict=True)), q_dim: q, k_dim: k}
    q_len, k_len = shape[q_dim], shape[k_dim]
    key = (kind, products, batch, heads, q_len, k_len)
    if key not in readers:
        readers[key] = kind(view, {b: batch, h: heads, q: q_len, k: k_len}, products=products)
    return ScoreSpace(batch, heads, q_len, k_len, tuple(at[n] for n in range(len(shape))), readers[key])


def batch_index(sizes: Sequence[Any], alone: Sequence[bool] = ()) -> Leading:
    """Index the dimensions other than queries and keys: one is b, the others together are h.

    b is the only one of symbolic size, otherwise the first. ``alone``: for each dimension, whether the query has it and
    the key has not; these vary fastest, so that a group of query heads shares a key head.
    """
    if not sizes:
        return (), sympy.Integer(1), sympy.Integer(1)
    symbolic = [n for n, size in enumerate(sizes) if not sympy.sympify(size).is_Integer]
    batch = symbolic[0] if len(symbolic) == 1 else 0
    rest = [n for n in range(len(sizes)) if n != batch]
    rest = sorted(rest, key=lambda n: any(alone[n : n + 1]))
    in_heads = [sizes[n] for n in rest]
    require_fixed(1, *in_heads[1:])
    at = {batch: b, **dict(zip(rest, digits_of(h, in_heads), strict=True))}
    return tuple(at[n] for n in range(len(sizes))), sizes[batch], sympy.Mul(*in_heads)

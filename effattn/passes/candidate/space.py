"""The space of scores: which of their dimensions are batch, heads, queries and keys, and one reader for all alike."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy

from effattn.ir.expr import b, h, k, q
from effattn.passes.candidate.record import ScoreSpace, require_fixed
from effattn.passes.graph.view import GraphView
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.heads import digits_of

Readers = dict[tuple, Reader]  # of one graph, by what they read
Leading = tuple[tuple[Any, ...], Any, Any]  # (index of each dimension of batch and heads in b and h, batch, heads)


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
    """The space of scores of ``shape``, whose dimensions ``rows`` are those of queries and keys.

    Args:
        leading: of the other dimensions; None: as :func:`batch_index` has it.
        alone: dimensions that the query has and the key has not.
        products: the reader stops at products.
        kind: of reader.
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
    """Of the dimensions beside queries and keys one is b, the others together are h.

    b is the one of symbolic size, else the first. ``alone``: whether the query has a dimension and the key has not;
    these vary fastest, so that a group of query heads shares a key.
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

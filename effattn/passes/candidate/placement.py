"""From the op's result [B, H, Nq, Dv] to the shape of the node it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir.expr import b, h, q
from effattn.passes.candidate.operands import depth
from effattn.passes.symbolic.heads import Digit, digit, in_order, sizes_of


@dataclass(frozen=True)
class Placement:
    """In order: drop size-1 dimensions, split heads and depth, permute, merge neighbours, insert size-1 dimensions."""

    drops: tuple[int, ...]
    heads: tuple[int, ...]  # sizes of the dimensions of heads; () if there is at most one
    widths: tuple[int, ...]  # the same for value_dim
    order: tuple[int, ...]
    merges: tuple[int, ...]  # dimensions to merge with the next one
    new: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        changed = self.drops or self.heads or self.widths or self.merges or self.new
        return not changed and self.order == (0, 1, 2, 3)

    def emit(self, graph: fx.Graph, node: fx.Node, annotate) -> fx.Node:
        for dim in self.drops:
            node = annotate(graph.call_function(torch.select, (node, dim, 0)))
        if self.heads:
            node = annotate(graph.call_method("unflatten", (node, 1 - self.drops.count(0), self.heads)))
        if self.widths:
            node = annotate(graph.call_method("unflatten", (node, -1, self.widths)))
        if self.order != tuple(range(len(self.order))):
            node = annotate(graph.call_method("permute", (node, self.order)))
        for dim in self.merges:
            node = annotate(graph.call_method("flatten", (node, dim, dim + 1)))
        for dim in self.new:
            node = annotate(graph.call_method("unsqueeze", (node, dim)))
        return node


def placement(index: tuple[Any, ...], heads, q_len, value_dim) -> Placement | None:
    """The placement for a result whose dimension i has the index ``index[i]``, a term in b, h, q and d."""
    axes: list[Any] = []  # b, q, or (h or depth, a digit of it), in the order of the result
    merges: list[int] = []
    new: list[int] = []
    for dim, entry in enumerate(sympy.expand(entry) for entry in index):
        if entry in (b, q):
            axes.append(entry)
        elif (part := digit(entry)) is not None:
            axes.append((h, part))
        elif (part := digit(entry, depth)) is not None:
            axes.append((depth, part))
        elif entry == b * heads + h:
            merges.append(dim - len(new))
            axes += [b, (h, Digit(1, None))]
        elif entry == sympy.expand(h * q_len + q):
            merges.append(dim - len(new))
            axes += [(h, Digit(1, None)), q]
        elif entry == 0:
            new.append(dim)
        else:
            return None
    in_heads, in_depth = _sorted(axes, h, heads), _sorted(axes, depth, value_dim)
    if q not in axes or in_heads is None or not in_depth or len(set(axes)) < len(axes):
        return None
    if not in_heads and heads != 1:
        return None
    drops = (*(() if in_heads else (1,)), *(() if b in axes else (0,)))
    sizes = sizes_of(in_heads, heads) if len(in_heads) > 1 else ()
    widths = sizes_of(in_depth, value_dim) if len(in_depth) > 1 else ()
    held = [*([b] if b in axes else []), *((h, part) for part in in_heads), q, *((depth, part) for part in in_depth)]
    return Placement(drops, sizes, widths, tuple(held.index(axis) for axis in axes), tuple(merges), tuple(new))


def _sorted(axes: list[Any], number: Any, limit: Any) -> list[Digit] | None:
    """The digits of ``number`` among ``axes``, slowest first; None if they do not make up the whole number."""
    digits = [axis[1] for axis in axes if isinstance(axis, tuple) and axis[0] is number]
    order = in_order(digits, limit)
    if order is None or (digits and digits[order[-1]].divisor != 1):
        return None
    return [digits[place] for place in order]

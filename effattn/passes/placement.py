"""Where the op's [B, H, Nq, Dv] result goes: the steps that give it the shape of the node it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir.expr import b, h, q
from effattn.passes.heads import Digit, digit, in_order
from effattn.passes.operands import depth


@dataclass(frozen=True)
class Placement:
    """First drop size-1 dimensions, then split heads, permute, merge neighbours, and put in size-1 dimensions."""

    drops: tuple[int, ...]
    heads: tuple[int, ...]  # sizes of the dimensions that heads lie in; () if it is at most one
    order: tuple[int, ...]
    merges: tuple[int, ...]  # dimensions that are merged with the next
    new: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        return not (self.drops or self.heads or self.merges or self.new) and self.order == (0, 1, 2, 3)

    def emit(self, graph: fx.Graph, node: fx.Node, remember) -> fx.Node:
        for dim in self.drops:
            node = remember(graph.call_function(torch.select, (node, dim, 0)))
        if self.heads:
            node = remember(graph.call_method("unflatten", (node, 1 - self.drops.count(0), self.heads)))
        if self.order != tuple(range(len(self.order))):
            node = remember(graph.call_method("permute", (node, self.order)))
        for dim in self.merges:
            node = remember(graph.call_method("flatten", (node, dim, dim + 1)))
        for dim in self.new:
            node = remember(graph.call_method("unsqueeze", (node, dim)))
        return node


def placement(index: tuple[Any, ...], heads, q_len) -> Placement | None:
    """The placement for a result whose dimension i is indexed by ``index[i]``, a term in b, h, q and d."""
    axes: list[Any] = []  # b, q, depth or a digit of h, as they follow each other in the result
    merges: list[int] = []
    new: list[int] = []
    for dim, entry in enumerate(sympy.expand(entry) for entry in index):
        if entry in (b, q, depth):
            axes.append(entry)
        elif (part := digit(entry)) is not None:
            axes.append(part)
        elif entry == b * heads + h:
            merges.append(dim - len(new))
            axes += [b, Digit(1, None)]
        elif entry == sympy.expand(h * q_len + q):
            merges.append(dim - len(new))
            axes += [Digit(1, None), q]
        elif entry == 0:
            new.append(dim)
        else:
            return None
    digits = [axis for axis in axes if isinstance(axis, Digit)]
    order = in_order(digits, heads)
    if order is None or not {q, depth} <= set(axes) or len(set(axes)) < len(axes):
        return None
    if (digits[order[-1]].divisor if digits else heads) != 1:
        return None
    drops = (*(() if digits else (1,)), *(() if b in axes else (0,)))
    sizes: tuple[int, ...] = ()
    if len(digits) > 1:
        above = [int(heads), *(digits[place].divisor for place in order)]
        sizes = tuple(outer // inner for outer, inner in pairwise(above))
    held = [*([b] if b in axes else []), *(digits[place] for place in order), q, depth]
    return Placement(drops, sizes, tuple(held.index(axis) for axis in axes), tuple(merges), tuple(new))

"""Where the op's [B, H, Nq, Dv] result goes: the steps that give it the shape of the node it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import b, h, q
from effattn.passes.operands import depth

_CANONICAL = (b, h, q, depth)


@dataclass(frozen=True)
class Placement:
    """First drop size-1 dimensions, then permute, then merge or split neighbours."""

    drops: tuple[int, ...]
    order: tuple[int, ...]
    steps: tuple[tuple[str, tuple], ...]

    @property
    def is_identity(self) -> bool:
        return not self.drops and self.order == tuple(range(len(self.order))) and not self.steps

    def emit(self, graph: fx.Graph, node: fx.Node, remember) -> fx.Node:
        for dim in self.drops:
            node = remember(graph.call_function(torch.select, (node, dim, 0)))
        if self.order != tuple(range(len(self.order))):
            node = remember(graph.call_method("permute", (node, self.order)))
        for method, args in self.steps:
            node = remember(graph.call_method(method, (node, *args)))
        return node


def placement(index: tuple[Any, ...], heads) -> Placement | None:
    """The placement for a result whose dimension i is indexed by ``index[i]``, a term in b, h, q and d."""
    order: list[sympy.Symbol] = []
    for entry in index:
        for symbol in _in_reading_order(entry):
            if symbol not in order:
                order.append(symbol)
    if any(symbol not in _CANONICAL for symbol in order) or not {q, depth} <= set(order):
        return None
    drops = tuple(axis for axis in (1, 0) if _CANONICAL[axis] not in order)
    kept = [symbol for symbol in _CANONICAL if symbol in order]
    steps: list[tuple[str, tuple]] = []
    position, place = 0, 0
    while position < len(index):
        entry = sympy.expand(index[position])
        symbols = _in_reading_order(entry)
        if place < len(order) and entry == order[place]:
            place += 1
        elif symbols == [b, h] and entry == b * heads + h:
            steps.append(("flatten", (position, position + 1)))
            place += 2
        elif isinstance(entry, expr.FloorDiv) and entry.args[0] == h and entry.args[1].is_Integer:
            inner = int(entry.args[1])
            following = index[position + 1] if position + 1 < len(index) else None
            if following != expr.Modulo(h, inner) or not sympy.sympify(heads).is_Integer or order[place] != h:
                return None
            steps.append(("unflatten", (position, (int(heads) // inner, inner))))
            position += 1
            place += 1
        else:
            return None
        position += 1
    if place != len(order):
        return None
    return Placement(drops, tuple(kept.index(symbol) for symbol in order), tuple(steps))


def _in_reading_order(entry) -> list[sympy.Symbol]:
    """Index symbols of an entry, the slowest varying first."""
    return [symbol for symbol in _CANONICAL if sympy.sympify(entry).has(symbol)]

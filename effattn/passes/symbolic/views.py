"""Readers of views: which element of the source has this index?"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.index_bounds import recombined
from effattn.passes.symbolic.pointwise import aligned
from effattn.passes.symbolic.reader import Index, Reader, Reading, reads


def reshape_groups(old: tuple, new: tuple) -> list[tuple[list[int], list[int]]] | None:
    """Runs of old and new dimensions with equal products; None if symbolic sizes leave them unclear."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        product_old = product_new = sympy.Integer(1)
        if i < len(old) and (j >= len(new) or (old[i] == 1 and new[j] != 1)):
            groups.append(([i], []))
            i += 1
            continue
        if j < len(new) and (i >= len(old) or (new[j] == 1 and old[i] != 1)):
            groups.append(([], [j]))
            j += 1
            continue
        left.append(i)
        right.append(j)
        product_old, product_new = old[i], new[j]
        i, j = i + 1, j + 1
        while (ratio := sympy.cancel(product_old / product_new)) != 1:
            shrink = sympy.denom(ratio) != 1
            if shrink and i < len(old):
                product_old *= old[i]
                left.append(i)
                i += 1
            elif not shrink and j < len(new):
                product_new *= new[j]
                right.append(j)
                j += 1
            else:
                return None
        groups.append((left, right))
    return groups


def reshape_index(reader: Reader, source: tuple, target: tuple, index: Index) -> Index | None:
    """The index in shape ``source`` of the element with ``index`` in shape ``target``; None if unknown."""
    groups = reshape_groups(source, target)
    if groups is None:
        return None
    found: list[Any] = [sympy.Integer(0)] * len(source)
    for old_dims, new_dims in groups:
        if len(old_dims) == len(new_dims) == 1:
            found[old_dims[0]] = index[new_dims[0]]
            continue
        flat: Any = sympy.Integer(0)
        for dim in new_dims:
            flat = flat * target[dim] + (sympy.Integer(0) if target[dim] == 1 else index[dim])
        flat = recombined(sympy.expand(flat))
        for dim in reversed(old_dims[1:]):
            flat, found[dim] = reader.divide(flat, source[dim])
        if old_dims:
            found[old_dims[0]] = flat
    return tuple(found)


@reads("reshape")
def reshape(reader: Reader, call: Call, shape):
    source = reader.argument(call, "input")
    if reshape_groups(source.shape, shape) is None or reinterprets(reader.view, call):
        return None

    def at(index: Index):
        inside = reshape_index(reader, source.shape, shape, index)
        assert inside is not None
        return source.at(inside)

    return Reading(shape, source.kind, at)


def reinterprets(view: GraphView, call: Call) -> bool:
    """Whether the call is ``x.view(dtype)``, which reinterprets the bits."""
    source, result = view.tensor(call.get("input")), view.tensor(call.node)
    return source is None or result is None or source.dtype != result.dtype


def permutation(call: Call, rank: int) -> tuple[int, ...] | None:
    """The order of dimensions of a transpose, permute, movedim, T or mT; None for other calls."""
    order = list(range(rank))
    if call.name == "transpose":
        a, b = call.get("dim0", call.get("axis0")), call.get("dim1", call.get("axis1"))
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    if call.name == "permute":
        return tuple(dim % rank for dim in call.get("dims", ()))
    if call.name == "t":
        return tuple(reversed(order)) if rank <= 2 else (*order[:-2], rank - 1, rank - 2)
    if call.name == "getattr" and call.get("name") in ("T", "mT", "H", "mH"):
        if call.get("name") in ("T", "H"):
            return tuple(reversed(order))
        return (*order[:-2], rank - 1, rank - 2)
    if call.name == "movedim" and isinstance(call.get("source"), int) and isinstance(call.get("destination"), int):
        start, end = call.get("source") % rank, call.get("destination") % rank
        order.remove(start)
        order.insert(end, start)
        return tuple(order)
    return None


@reads("transpose", "permute", "movedim", "t", "getattr")
def permute(reader: Reader, call: Call, shape):
    if not isinstance(reader.view.tensor(call.get("input")), torch.Tensor):
        return None
    source = reader.argument(call, "input")
    order = permutation(call, len(source.shape))
    if order is None:
        return None

    def at(index: Index):
        inside: list[Any] = [None] * len(index)
        for new, old in enumerate(order):
            inside[old] = index[new]
        return source.at(tuple(inside))

    return Reading(shape, source.kind, at)


@reads("expand")
def expand(reader: Reader, call: Call, shape):
    source = reader.argument(call, "input")

    def at(index: Index):
        return source.at(aligned(source, index, shape))

    return Reading(shape, source.kind, at)


@reads("repeat_interleave")
def repeat_interleave(reader: Reader, call: Call, shape):
    repeats, dim = call.get("repeats"), call.get("dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    source = reader.argument(call, "input")
    dim %= len(shape)

    def at(index: Index):
        return source.at(tuple(reader.divide(i, repeats)[0] if axis == dim else i for axis, i in enumerate(index)))

    return Reading(shape, source.kind, at)


@reads("repeat")
def repeat(reader: Reader, call: Call, shape):
    source = reader.argument(call, "input")
    extra = len(shape) - len(source.shape)

    def at(index: Index):
        tail = index[extra:]
        return source.at(tuple(reader.divide(i, size)[1] for i, size in zip(tail, source.shape, strict=True)))

    return Reading(shape, source.kind, at)

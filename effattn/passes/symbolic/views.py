"""Readers of views: where does the element at this index come from?"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.elementwise import aligned
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, reads, recombined


def reshape_groups(old: tuple, new: tuple) -> list[tuple[list[int], list[int]]] | None:
    """Runs of old and new dimensions with equal products; None if the sizes cannot be told apart symbolically."""
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
    """Where ``index`` of a tensor of shape ``target`` lies in the same elements seen with shape ``source``."""
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
    """Whether ``x.view(dtype)`` reads the same bits as other numbers."""
    source, result = view.tensor(call.get("input")), view.tensor(call.node)
    return source is None or result is None or source.dtype != result.dtype


def permutation(call: Call, rank: int) -> tuple[int, ...] | None:
    """The order of a transpose, permute, movedim, T or mT; None if ``call`` is none of them."""
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


@reads("select")
def select(reader: Reader, call: Call, shape):
    dim, position = call.get("dim"), call.get("index")
    if not isinstance(dim, int) or not isinstance(position, int):
        return None
    return _basic_index(reader, call, shape, {dim: position})


@reads("gather")
def gather(reader: Reader, call: Call, shape):
    """A shift of relative positions: ``table.gather(-1, query - key + length)``. An index that is data stays data."""
    dim, index_node = call.get("dim"), call.get("index")
    if not isinstance(dim, int) or not isinstance(index_node, fx.Node) or call.get("out") is not None:
        return None
    source, picked = reader.argument(call, "input"), reader.argument(call, "index")
    if picked.kind != "int" or not source.shape:
        return None
    dim %= len(source.shape)

    def at(index: Index):
        place = picked.at(index)
        if expr.loads_of(place):
            raise Unreadable("gathered at places that are data")
        return source.at((*index[:dim], place, *index[dim + 1 :]))

    return Reading(shape, source.kind, at)


@reads("narrow")
def narrow(reader: Reader, call: Call, shape):
    dim, start = call.get("dim"), reader.view.value(call.get("start"))
    if not isinstance(dim, int) or not isinstance(start, (int, torch.SymInt)):
        return None
    return _basic_index(reader, call, shape, {dim: slice(start, None, None)})


def _basic_index(reader: Reader, call: Call, shape, at_dims: dict[int, Any]):
    source = reader.argument(call, "input")
    rank = len(source.shape)
    spec = [at_dims.get(dim, at_dims.get(dim - rank, slice(None))) for dim in range(rank)]
    return indexed(reader, source, spec, shape, reader.view.time[call.node])


@reads("getitem")
def getitem(reader: Reader, call: Call, shape):
    item = call.get("index")
    container = call.get("input")
    if not isinstance(container, fx.Node):
        return None
    if reader.view.tensor(container) is None:
        return _piece(reader, container, item, shape)
    spec = list(item) if isinstance(item, tuple) else [item]
    source = reader.argument(call, "input")
    return indexed(reader, source, spec, shape, reader.view.time[call.node])


def _piece(reader: Reader, container: fx.Node, item: Any, shape):
    """An element of what chunk, split or unbind returned."""
    call = reader.view.call(container)
    if call is None or call.name not in ("chunk", "split", "unbind") or not isinstance(item, int):
        return None
    source, dim = reader.argument(call, "input"), call.get("dim", 0)
    if not isinstance(dim, int):
        return None
    dim %= len(source.shape)
    pieces = reader.view.value(container)
    if item < 0:
        item += len(pieces)
    if call.name == "unbind":
        return Reading(shape, source.kind, lambda i: source.at((*i[:dim], sympy.Integer(item), *i[dim:])))
    start = sum((reader.extent(piece.shape[dim]) for piece in pieces[:item]), sympy.Integer(0))
    return Reading(shape, source.kind, lambda i: source.at((*i[:dim], i[dim] + start, *i[dim + 1 :])))


def indexed(reader: Reader, source: Reading, spec: list[Any], shape, time: int) -> Reading | None:
    """``source[spec]`` for integers, slices, None, Ellipsis and integer tensors (of which a result dimension group)."""
    consumed = sum(1 for item in spec if item is not None and item is not Ellipsis)
    if Ellipsis in [item for item in spec if not isinstance(item, (fx.Node, torch.SymInt))]:
        where = next(n for n, item in enumerate(spec) if item is Ellipsis)
        fill = [slice(None)] * (len(source.shape) - consumed)
        spec = [*spec[:where], *fill, *spec[where + 1 :]]
    else:
        spec = [*spec, *[slice(None)] * (len(source.shape) - consumed)]

    tensors: list[tuple[int, Reading]] = []
    steps: list[tuple[str, Any]] = []  # one entry per item, source dimensions in order
    for position, item in enumerate(spec):
        if item is None:
            steps.append(("new", None))
        elif isinstance(item, slice):
            bounds = _slice_start(reader, item, source.shape[sum(1 for s, _ in steps if s != "new")])
            if bounds is None:
                return None
            steps.append(("slice", bounds))
        elif isinstance(item, bool):
            return None
        elif isinstance(item, (int, torch.SymInt)):
            size = source.shape[sum(1 for s, _ in steps if s != "new")]
            offset = reader.extent(item)
            if isinstance(item, torch.SymInt) and offset.is_nonnegative is not True:
                return None
            steps.append(("int", offset + size if isinstance(item, int) and item < 0 else offset))
        elif isinstance(item, fx.Node):
            if reader.view.tensor(item) is None:
                offset = reader.extent(item)
                if offset.is_nonnegative is not True:
                    return None
                steps.append(("int", offset))
                continue
            picked = reader.read(item, time)
            if picked.kind != "int":
                return None  # boolean masks select a number of rows that only the data knows
            tensors.append((position, picked))
            steps.append(("tensor", picked))
        else:
            return None
    return _compose(reader, source, steps, tensors, shape)


def _compose(reader: Reader, source: Reading, steps, tensors, shape) -> Reading | None:
    rank = max((len(picked.shape) for _, picked in tensors), default=0)
    positions = [position for position, _ in tensors]
    together = positions == list(range(positions[0], positions[0] + len(positions))) if positions else True
    group_shape = _broadcast([picked.shape for _, picked in tensors], rank)
    if rank and any(kind == "int" for kind, _ in steps):
        return None  # an integer beside index tensors moves dimensions; rare enough to leave as data

    def at(index: Index):
        if tensors and not together:
            group, rest = index[:rank], list(index[rank:])
        elif tensors:
            before = sum(1 for kind, _ in steps[: positions[0]] if kind in ("new", "slice"))
            group, rest = index[before : before + rank], [*index[:before], *index[before + rank :]]
        else:
            group, rest = (), list(index)
        inside: list[Any] = []
        for kind, value in steps:
            if kind == "new":
                rest.pop(0)
            elif kind == "slice":
                start, step = value
                inside.append(start + step * rest.pop(0))
            elif kind == "int":
                inside.append(value)
            else:
                picked = value.at(aligned(value, tuple(group), group_shape))
                inside.append(_from_the_end(reader, picked, source.shape[len(inside)]))
        return source.at(tuple(inside))

    return Reading(shape, source.kind, at)


def _from_the_end(reader: Reader, index, size):
    """An index that may be negative counts from the end then.

    Raises: Unreadable: outside of mods, where what it picks has a value for each query and key already, as data.
    """
    if reader.nonnegative(index):
        return index
    if not reader.everything:
        raise Unreadable(f"index {index} may be negative")
    return expr.Where(index < 0, index + size, index)


def _broadcast(shapes: list[tuple], rank: int) -> tuple:
    full: list[Any] = [sympy.Integer(1)] * rank
    for shape in shapes:
        for dim, size in enumerate(shape, start=rank - len(shape)):
            full[dim] = size if full[dim] == 1 else full[dim]
    return tuple(full)


def _slice_start(reader: Reader, item: slice, size) -> tuple[Any, Any] | None:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step <= 0:
        return None
    if item.start is None:
        return sympy.Integer(0), sympy.Integer(step)
    start = reader.extent(item.start)
    if start.is_nonnegative is True:
        return start, sympy.Integer(step)
    if start.is_negative is True and sympy.expand(size + start).is_nonnegative is True:
        return size + start, sympy.Integer(step)
    return None

"""Readers of indexing: select, narrow, gather, and x[...] with integers, slices and tensors."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import aligned
from effattn.passes.symbolic.reader import Index, Reader, Reading, Unreadable, reads


@reads("select")
def select(reader: Reader, call: Call, shape):
    dim, position = call.get("dim"), call.get("index")
    if not isinstance(dim, int) or not isinstance(position, int):
        return None
    return _basic_index(reader, call, shape, {dim: position})


@reads("gather")
def gather(reader: Reader, call: Call, shape):
    """A shift of relative positions: ``table.gather(-1, query - key + length)``. Indices from data are not read."""
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
            raise Unreadable("gathered at indices that are data")
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
    """One of the tensors that chunk, split or unbind returned."""
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
    """``source[spec]`` with ints, slices, None, Ellipsis and integer tensors (one group of result dimensions)."""
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
                return None  # boolean masks select a data-dependent number of elements
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
        return None  # an integer beside index tensors moves dimensions; too rare to support

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
    """An index that may be negative, as one that counts from the start.

    Raises Unreadable outside a score_mod or mask_mod: the indexed tensor then becomes a captured tensor instead.
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

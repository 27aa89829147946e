"""Readers of tensors that are written in part: ``scores[..., 1:] += bias``, ``scores[hidden] = -inf``."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import aligned, stored_as
from effattn.passes.symbolic.reader import Index, Reader, Reading, kind_of, reads

_HALF = (torch.float16, torch.bfloat16)


def _assignment(view: GraphView, value: fx.Node, writer: fx.Node) -> Call | None:
    """The write to ``value`` by ``writer`` as an assignment to part of it; None if it is not one."""
    call = view.call(writer)
    if call is None or (call.name == "setitem" and call.get("input") is value):
        return call
    through = view.call(view.written_as(writer))
    if through is None or through.get("input") is not value or view.writes(through.node):
        return None
    index = through.get("index")
    if through.name == "select" and isinstance(through.get("dim"), int):
        index = (*[slice(None)] * (through.get("dim") % len(view.shape(value))), index)
    elif through.name == "narrow" and isinstance(through.get("dim"), int):
        start, length = through.get("start"), through.get("length")
        if not isinstance(start, int) or not isinstance(length, int) or start < 0:
            return None
        index = (*[slice(None)] * (through.get("dim") % len(view.shape(value))), slice(start, start + length))
    elif through.name != "getitem":
        return None
    return Call("setitem", writer, {"input": value, "index": index, "value": writer})


@reads("written")
def written(reader: Reader, call: Call, shape):
    """The tensor ``input`` after the call's node wrote part of it."""
    tensor = reader.view.held(call.get("input"))
    assignment = _assignment(reader.view, call.get("input"), call.node)
    if assignment is None or any(stride == 0 for stride in tensor.stride()):
        return None
    call = assignment
    before, new = reader.argument(call, "input"), reader.argument(call, "value")
    if tensor.is_complex() or not _held_as_it_is(reader, tensor.dtype, call.get("value"), new):
        return None
    part = _part(reader, call, shape)
    if part is None:
        return None
    conditions, dims, sizes = part

    def at(index: Index):
        test = conditions(index)
        local = tuple(index[dim] - start for dim, start in dims)
        inside = aligned(new, local, sizes) if new.shape else ()
        if before.kind == "bool":
            yes, no = new.bool_at(inside), before.bool_at(index)
            return sympy.Or(sympy.And(test, yes), sympy.And(sympy.Not(test), no))
        yes, no = stored_as(new.number_at(inside), tensor.dtype), before.number_at(index)
        if isinstance(no, expr.Where) and no.args[0] == test:
            no = no.args[2]  # a later write to the same part replaces the earlier one
        return yes if yes == no else expr.Where(test, yes, no)

    return Reading(shape, kind_of(tensor.dtype), at)


def _held_as_it_is(reader: Reader, dtype: torch.dtype, written: Any, new: Reading) -> bool:
    """Whether a tensor of ``dtype`` stores the written value without rounding or truncation."""
    kind, held = kind_of(dtype), reader.view.tensor(written)
    if held is None or held.dtype == dtype:
        return kind != "int" or new.kind != "float"
    if kind == "bool" or (kind == "int" and new.kind != "bool"):
        return False
    return dtype not in _HALF and held.dtype != torch.float64 and new.kind != "int"


def _part(reader: Reader, call: Call, shape):
    """(index -> whether it is in the part, (dimension, start) of each of the part's dimensions, their sizes)."""
    item = call.get("index")
    items = list(item) if isinstance(item, tuple) else [item]
    if len(items) == 1 and (mask := reader.view.tensor(items[0])) is not None:
        return _chosen(reader, call, items[0], mask, shape)
    places = [n for n, entry in enumerate(items) if entry is Ellipsis]
    filled = [slice(None)] * (len(shape) - len(items) + len(places))
    items = [*items[: places[0]], *filled, *items[places[0] + 1 :]] if places else [*items, *filled]
    if len(items) != len(shape) or len(places) > 1:
        return None
    bounds: list[tuple[int, Any, Any, bool]] = []  # dimension, start, end, whether it is indexed by an integer
    for dim, (entry, size) in enumerate(zip(items, shape, strict=True)):
        if isinstance(entry, bool) or not isinstance(entry, (slice, int)):
            return None
        if isinstance(entry, int):
            start = sympy.Integer(entry) + (size if entry < 0 else 0)
            bounds.append((dim, start, start + 1, True))
            continue
        ends = [_place(reader, end, size, default) for end, default in ((entry.start, 0), (entry.stop, size))]
        if entry.step not in (None, 1) or None in ends:
            return None
        bounds.append((dim, *ends, False))

    def conditions(index: Index):
        tests: list[Any] = []
        for dim, start, end, one in bounds:
            if one:
                tests.append(sympy.Eq(index[dim], start))
                continue
            if start != 0:
                tests.append(index[dim] >= start)
            if sympy.expand(shape[dim] - end) != 0:
                tests.append(index[dim] < end)
        return sympy.And(*tests)

    kept = [(dim, start, end) for dim, start, end, one in bounds if not one]
    return conditions, [(dim, start) for dim, start, _ in kept], tuple(end - start for _, start, end in kept)


def _place(reader: Reader, end: Any, size: Any, default: Any) -> Any:
    """A slice bound as a nonnegative index; None if unknown."""
    if end is None:
        return sympy.sympify(default)
    held = reader.view.value(end)
    if not isinstance(held, (int, torch.SymInt)):
        return None
    place = reader.extent(end)
    if place.is_negative is True:
        place = size + place
    inside = place.is_nonnegative is True and sympy.expand(size - place).is_nonnegative is True
    return place if inside else None


def _chosen(reader: Reader, call: Call, node: fx.Node, mask: torch.Tensor, shape):
    """A number written where a mask of all dimensions holds."""
    written = reader.view.tensor(call.get("value"))
    if mask.dtype != torch.bool or mask.dim() != len(shape) or (written is not None and written.dim() != 0):
        return None
    test = reader.read(node, reader.view.time[call.node])
    return test.bool_at, [], ()

"""Readers of tensor creation, concatenation, padding, cumsum and diff."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from effattn.ir import expr
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic.pointwise import stored_as
from effattn.passes.symbolic.reader import Index, Reader, Reading, generic_index, kind_of, reads
from effattn.passes.symbolic.widths import check_held, fits


@reads("arange")
def arange(reader: Reader, call: Call, shape):
    bounds = [*call.get("bounds", ()), *[call.args[name] for name in ("start", "end", "step") if name in call.args]]
    values = [reader.view.value(bound) for bound in bounds]
    tensor = reader.view.tensor(call.node)
    if tensor is None or not all(isinstance(value, (int, torch.SymInt)) for value in values):
        return None
    if len(bounds) != len(call.get("bounds", ())) and "end" not in call.args:
        return None
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return None
    if "end" in call.args:
        start = reader.extent(call.get("start", call.get("bounds", (0,))[0] if call.get("bounds") else 0))
        step = reader.extent(call.get("step", 1))
    else:
        start = reader.extent(values[0]) if len(values) > 1 else sympy.Integer(0)
        step = reader.extent(values[2]) if len(values) > 2 else sympy.Integer(1)

    def at(index: Index):
        value = start + step * index[0]
        check_held(reader, value, tensor.dtype)
        return value

    return Reading(shape, kind_of(tensor.dtype), at)


def _filled(reader: Reader, call: Call, shape, value: Any):
    tensor = reader.view.tensor(call.node)
    if tensor is None:
        return None
    kind = kind_of(tensor.dtype)
    if kind == "bool":
        return Reading(shape, "bool", lambda index: sympy.true if value else sympy.false)
    if not fits(value, tensor):
        return None
    held = stored_as(sympy.sympify(value), tensor.dtype)
    return Reading(shape, kind, lambda index: held)


@reads("ones")
def ones(reader: Reader, call: Call, shape):
    return _filled(reader, call, shape, 1)


@reads("zeros", "zero")
def zeros(reader: Reader, call: Call, shape):
    return _filled(reader, call, shape, 0)


@reads("full", "tensor", "fill")
def full(reader: Reader, call: Call, shape):
    value = reader.view.value(call.get("fill_value", call.get("data", call.get("value"))))
    if not isinstance(value, (int, float, bool)) or value != value:
        return None
    return _filled(reader, call, shape, value)


def _half(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < 4


@reads("cumsum")
def cumsum(reader: Reader, call: Call, shape):
    source, dim, dtype = reader.argument(call, "input"), call.get("dim"), reader.view.held(call.node).dtype
    if not isinstance(dim, int) or not source.shape or kind_of(dtype) == "bool" or _half(dtype):
        return None
    dim %= len(source.shape)
    probe = sympy.Symbol("along", integer=True, nonnegative=True)
    generic = tuple(probe if axis == dim else i for axis, i in enumerate(generic_index(len(source.shape))))
    if source.number_at(generic).has(probe):
        return None  # a running sum of data

    def at(index: Index):
        value = source.number_at(index) * (index[dim] + 1)
        check_held(reader, value, dtype)
        return value

    return Reading(shape, "int" if source.kind == "bool" else source.kind, at)


@reads("diff")
def diff(reader: Reader, call: Call, shape):
    source = reader.argument(call, "input")
    dim, steps = call.get("dim", -1), call.get("n", 1)
    if steps != 1 or call.get("append") is not None or not isinstance(dim, int) or source.kind == "bool":
        return None
    dtype = reader.view.held(call.node).dtype
    if _half(dtype):
        return None
    dim %= len(source.shape)
    before = call.get("prepend")
    if before is not None:
        source = joined([reader.read(before, reader.view.time[call.node]), source], dim)

    def at(index: Index):
        following = tuple(i + 1 if axis == dim else i for axis, i in enumerate(index))
        value = source.at(following) - source.at(index)
        check_held(reader, value, dtype)
        return value

    return Reading(shape, source.kind, at)


@reads("cat")
def cat(reader: Reader, call: Call, shape):
    parts = [reader.read(part, reader.view.time[call.node]) for part in call.get("tensors", ())]
    dim = call.get("dim", 0)
    if not isinstance(dim, int) or len(parts) > 4 or any(len(part.shape) != len(shape) for part in parts):
        return None
    if len({part.kind for part in parts}) != 1:
        return None
    return joined(parts, dim % len(shape))


@reads("hstack")
def hstack(reader: Reader, call: Call, shape):
    return cat(reader, Call("cat", call.node, {**call.args, "dim": 0 if len(shape) == 1 else 1}), shape)


@reads("pad")
def pad(reader: Reader, call: Call, shape):
    """Constant padding. As in torch, sizes come in pairs (before, after), last dimension first."""
    source, sizes, value = reader.argument(call, "input"), call.get("pad"), call.get("value")
    value = 0 if value is None else value
    if call.get("mode", "constant") != "constant" or not isinstance(value, (int, float)) or value != value:
        return None
    untouched = [sympy.Integer(0)] * (len(shape) - len(sizes) // 2)
    first, last = ([*untouched, *[reader.extent(size) for size in sizes[side::2]][::-1]] for side in (0, 1))
    around = _filled(reader, call, shape, value)

    def at(index: Index):
        local = tuple(i - before for i, before in zip(index, first, strict=True))
        conditions = [i >= 0 for i, before in zip(local, first, strict=True) if before != 0]
        for place, old, before, after in zip(index, source.shape, first, last, strict=True):
            if after != 0 and not reader.below(place, before + old):
                conditions.append(place < before + old)
        inside, outside = sympy.And(*conditions), around.at(index)
        if source.kind != "bool":
            return expr.Where(inside, source.at(local), outside)
        held = source.at(local)
        return sympy.Or(sympy.Not(inside), held) if outside == sympy.true else sympy.And(inside, held)

    return Reading(shape, source.kind, at)


def joined(parts: list[Reading], dim: int) -> Reading:
    """Tensors concatenated along ``dim``; comparisons with the running length choose the part of an index."""
    kind = parts[0].kind

    def at(index: Index):
        def pick(number: int, start):
            local = tuple(i - start if axis == dim else i for axis, i in enumerate(index))
            here = parts[number]
            value = here.at(local)
            if number == len(parts) - 1:
                return value
            end = start + here.shape[dim]
            rest = pick(number + 1, end)
            inside = index[dim] < end
            if end == 1 and index[dim].is_Symbol and rest.subs(index[dim], 0) == value:
                return rest  # the first element continues the sequence, as when transformers prepends to positions
            if kind == "bool":
                return sympy.Or(sympy.And(inside, value), sympy.And(sympy.Not(inside), rest))
            return expr.Where(inside, value, rest)

        return pick(0, sympy.Integer(0))

    size = sum((part.shape[dim] for part in parts), sympy.Integer(0))
    shape = tuple(size if axis == dim else extent for axis, extent in enumerate(parts[0].shape))
    return Reading(shape, kind, at)

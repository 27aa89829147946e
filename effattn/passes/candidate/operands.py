"""Query, key and value: from a product back to the tensors that the op takes.

Views, expansion of grouped heads and constant factors between a projection and the product are folded. The operand is
the node nearest to the inputs whose dimensions are still clearly batch, head, row and head_dim.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from effattn.ir import expr
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, is_dead_dropout
from effattn.passes.symbolic import Reader
from effattn.passes.symbolic.heads import Digit, digit, how_many, in_order, in_steps
from effattn.passes.symbolic.reader import Index
from effattn.passes.symbolic.views import permutation, reinterprets, reshape_index

row = sympy.Symbol("row", integer=True, nonnegative=True)  # index of a query or key, depending on the operand
depth = sympy.Symbol("d", integer=True, nonnegative=True)  # index along head_dim


@dataclass(frozen=True)
class Operand:
    """A tensor node, and how it becomes [B, H, N, D].

    ``dims``: the node's dimensions of batch (None if it has none), heads (none, one or several), row, and depth (one or
    several); several are listed slowest first. ``picks``: (dimension, index) of dimensions that are indexed. ``some``:
    (dimension, first, step, count) of dimensions from which some heads are taken. ``groups``: query heads per head of
    the operand. All of these count dimensions after those in ``apart``, (dimension, size of the inner one), have been
    split in two, in this order.
    """

    node: fx.Node
    dims: tuple[int | None, tuple[int, ...], int, tuple[int, ...]]
    picks: tuple[tuple[int, int], ...]
    groups: int
    factor: Any  # constant factor that was folded
    time: int  # at which user code reads it
    folded: tuple[str, ...] = ()
    batch: Any = None  # expanded batch size if the batch shares it: an int, or (node, dimension)
    heads: int | None = None  # expanded number of heads if all heads share it
    some: tuple[tuple[int, int, int, int], ...] = ()
    apart: tuple[tuple[int, int], ...] = ()

    def shape(self, view: GraphView) -> list[Any]:
        """Sizes of the dimensions after splitting those in ``apart``."""
        sizes = list(view.shape(self.node))
        for dim, size in self.apart:
            sizes[dim : dim + 1] = [sizes[dim] / size, sympy.Integer(size)]
        return sizes

    def heads_in(self, view: GraphView) -> Any:
        """The number of the node's heads that belong to the operand."""
        sizes, taken = self.shape(view), {dim: count for dim, _, _, count in self.some}
        return sympy.Mul(*[taken.get(dim, sizes[dim]) for dim in self.dims[1]])

    def width_in(self, view: GraphView) -> Any:
        """Its head_dim."""
        sizes = self.shape(view)
        return sympy.Mul(*[sizes[dim] for dim in self.dims[3]])


def trace(
    view: GraphView,
    reader: Reader,
    node: fx.Node,
    index: Index,
    time: int,
    dtype: torch.dtype | None = None,
    whole: bool = False,
) -> Operand | None:
    """The operand behind ``node``, read at ``time`` with ``index`` in the symbols b, h, row and d.

    Casts from ``dtype`` to a wider dtype are skipped, since scores are computed in float32 anyway. ``whole``:
    expansions of heads are kept; a query needs all heads. If no node has separate dimensions for batch, heads and
    depth, a node whose dimensions can be split is taken.
    """
    found = _traced(view, reader, node, index, time, dtype, whole, apart=False)
    return found or _traced(view, reader, node, index, time, dtype, whole, apart=True)


def _traced(
    view: GraphView, reader: Reader, node: fx.Node, index: Index, time: int, dtype: Any, whole: bool, apart: bool
) -> Operand | None:
    best: Operand | None = None
    factor: Any = sympy.Integer(1)
    folded: list[str] = []
    while not view.changes_itself(node):
        found = _clean(view, reader, node, index, factor, time, tuple(folded), apart)
        if found is not None and not (whole and best is not None and _lacks_heads(reader, found)):
            best = found
        if view.writes_between(node, view.time[node], time):
            return best  # the node's value no longer follows from its definition
        call = view.call(node)
        if call is None or view.writes(node) or view.cuts_gradient(node, time):
            return best
        step = _step(view, reader, call, index, dtype)
        if step is None:
            return best
        time = view.time[node]
        node, index, scale, what = step
        factor = factor * scale
        if what:
            folded.append(what)
    return best


def _lacks_heads(reader: Reader, operand: Operand) -> bool:
    return reader.sizes[expr.h] != 1 and (not operand.dims[1] or operand.groups != 1)


def heads_beside_batch(view: GraphView, reader: Reader, node: fx.Node, index: Index, dtype: Any) -> int | None:
    """The number of heads merged with the batch in the dimension at index b, from a view between it and the inputs."""
    while True:
        for dim, entry in enumerate(index):
            if isinstance(entry, expr.Modulo) and entry.args[0] == expr.b and entry.args[1].is_Integer:
                return int(entry.args[1])
            if entry == expr.b and dim == 1 and index[0] == 0 and (size := view.shape(node)[1]).is_Integer:
                return int(size)  # [1, H, N, D]: batch size 1
        call = view.call(node)
        if call is None or view.writes(node) or (step := _step(view, reader, call, index, dtype)) is None:
            return None
        node, index = step[:2]


def _step(view: GraphView, reader: Reader, call: Call, index: Index, dtype: torch.dtype | None):
    """One operation towards the inputs: (node, its index, factor, what was folded), or None if it cannot be folded."""
    source = call.get("input")
    if call.name in ("mul", "div"):
        return _scaled(view, reader, call, index)
    if not isinstance(source, fx.Node) or view.tensor(source) is None:
        return None
    shape = view.shape(source)
    if call.name == "dropout":
        return (source, index, 1, "") if is_dead_dropout(call) else None
    if call.name == "identity":
        return source, index, 1, ""
    if call.casts:
        before, after = view.held(source).dtype, view.held(call.node).dtype
        widens = before == dtype and after.is_floating_point and before.itemsize < after.itemsize
        return (source, index, 1, "") if before == after or widens else None
    if call.name == "reshape" or (call.name == "getitem" and only_new_dims(call.get("index"))):
        inside = None if reinterprets(view, call) else reshape_index(reader, shape, view.shape(call.node), index)
        return None if inside is None else (source, inside, 1, "")
    if (order := permutation(call, len(shape))) is not None:
        inside_list: list[Any] = [None] * len(index)
        for new, old in enumerate(order):
            inside_list[old] = index[new]
        return source, tuple(inside_list), 1, ""
    if call.name == "expand":
        skip, full = len(index) - len(shape), view.shape(call.node)
        inside = tuple(
            sympy.Integer(0) if n == 1 and wide != 1 else i
            for n, i, wide in zip(shape, index[skip:], full[skip:], strict=True)
        )
        return source, inside, 1, "expand"
    if call.name == "repeat_interleave" and isinstance(call.get("repeats"), int) and isinstance(call.get("dim"), int):
        dim = call.get("dim") % len(shape)
        inside = tuple(reader.divide(i, call.get("repeats"))[0] if n == dim else i for n, i in enumerate(index))
        return source, inside, 1, "repeat_interleave"
    return None


def _scaled(view: GraphView, reader: Reader, call: Call, index: Index):
    left, right = call.get("input"), call.get("other")
    for tensor, factor in ((left, right), (right, left)):
        scale = _number(view, reader, factor, view.time[call.node])
        if isinstance(tensor, fx.Node) and isinstance(scale, (int, float)) and not isinstance(scale, bool):
            if call.name == "div" and (tensor is right or scale == 0 or call.get("rounding_mode") is not None):
                return None
            if not math.isfinite(scale):
                return None
            if not view.held(tensor).dtype.is_floating_point:
                return None
            number = sympy.Float(scale)
            return tensor, index, 1 / number if call.name == "div" else number, "scale"
    return None


def _number(view: GraphView, reader: Reader, value: Any, time: int) -> Any:
    """A factor that is a number, possibly in a 0-d tensor; None otherwise."""
    if not isinstance(value, fx.Node):
        return value
    tensor = view.tensor(value)
    if tensor is None or tensor.dim() != 0:
        return None
    found = sympy.sympify(reader.read(value, time).number_at(()))
    return float(found) if found.is_number and found.is_real else None


def only_new_dims(item: Any) -> bool:
    items = item if isinstance(item, tuple) else (item,)
    return all(
        part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None))
        for part in items
        if not isinstance(part, fx.Node)
    ) and not any(isinstance(part, fx.Node) for part in items)


def _cut(reader: Reader, index: Index, shape: Index) -> tuple[Index, Index, tuple[tuple[int, int], ...]]:
    """(index, sizes, ``apart``) with a dimension for each part of merged indices such as ``h + 3 * b``."""
    entries, sizes, apart = list(map(sympy.sympify, index)), list(shape), []
    dim = 0
    while dim < len(entries):
        factors = [part.as_coeff_Mul()[0] for part in sympy.Add.make_args(entries[dim])]
        larger = [int(factor) for factor in factors if factor.is_Integer and factor > 1]
        if len(factors) > 1 and larger and (sizes[dim] / min(larger)).is_integer:
            outer, inner = reader.divide(entries[dim], min(larger))
            if inner + min(larger) * outer == entries[dim]:
                entries[dim : dim + 1] = [outer, inner]
                sizes[dim : dim + 1] = [sizes[dim] / min(larger), sympy.Integer(min(larger))]
                apart.append((dim, min(larger)))
                continue
        dim += 1
    return tuple(entries), tuple(sizes), tuple(apart)


def _clean(
    view: GraphView, reader: Reader, node: fx.Node, index: Index, factor, time: int, folded, cut: bool
) -> Operand | None:
    """The operand if every dimension of ``node`` is clearly batch, head (or its group), row or depth; else None."""
    tensor = view.tensor(node)
    if tensor is None or not tensor.dtype.is_floating_point:
        return None
    shape = view.shape(node)
    apart: tuple[tuple[int, int], ...] = ()
    if cut:
        index, shape, apart = _cut(reader, index, shape)
    roles: dict[Any, int] = {}
    heads: list[tuple[Digit, int]] = []
    widths: list[tuple[Digit, int]] = []
    picks: list[tuple[int, int]] = []
    some: list[tuple[int, int, int, int]] = []
    for dim, entry in enumerate(map(sympy.sympify, index)):
        if entry in (expr.b, row) and entry not in roles:
            roles[entry] = dim
        elif (wide := digit(entry, depth)) is not None:
            widths.append((wide, dim))
        elif (found := in_steps(entry)) is not None:
            part, first, step = found
            count, size = how_many(part, reader.sizes[expr.h]), shape[dim]
            heads.append((part, dim))
            if (first, step) != (0, 1) or (count is not None and size.is_Integer and size > count):
                if count is None:
                    return None
                some.append((dim, first, step, count))
        elif entry.is_Integer and int(entry) >= 0:
            picks.append((dim, int(entry)))
        else:
            return None
    order = in_order([part for part, _ in heads], reader.sizes[expr.h])
    deep = in_order([part for part, _ in widths], reader.sizes[depth])
    if row not in roles or order is None or not deep or widths[deep[-1]][0].divisor != 1:
        return None
    in_heads, in_depth = tuple(heads[place][1] for place in order), tuple(widths[place][1] for place in deep)
    dims = (roles.get(expr.b), in_heads, roles[row], in_depth)
    groups = heads[order[-1]][0].divisor if heads else 1
    return Operand(node, dims, tuple(picks), groups, factor, time, folded, some=tuple(some), apart=apart)


def emit(graph: fx.Graph, operand: Operand, annotate) -> fx.Node:
    """Insert nodes that turn the operand into [B, H, N, D]; ``annotate(node)`` records its fake value."""
    node = operand.node
    batch, heads, length, depths = operand.dims
    keep = [*([] if batch is None else [batch]), *heads, length, *depths]
    for dim, size in operand.apart:
        node = annotate(graph.call_method("unflatten", (node, dim, (-1, size))))
    for dim, first, step, count in operand.some:
        index = (*[slice(None)] * dim, slice(first, first + step * count, step))
        node = annotate(graph.call_function(operator.getitem, (node, index)))
    for dim, position in sorted(operand.picks, reverse=True):
        node = annotate(graph.call_function(torch.select, (node, dim, position)))
        keep = [d - 1 if d > dim else d for d in keep]
    if keep != sorted(keep):
        node = annotate(graph.call_method("permute", (node, tuple(keep))))
    if batch is None:
        node = annotate(graph.call_method("unsqueeze", (node, 0)))
    if len(heads) > 1:
        node = annotate(graph.call_method("flatten", (node, 1, len(heads))))
    elif not heads:
        node = annotate(graph.call_method("unsqueeze", (node, 1)))
    if len(depths) > 1:
        node = annotate(graph.call_method("flatten", (node, 3)))
    if operand.batch is None and operand.heads is None:
        return node
    sizes = [-1 if size is None else size for size in (operand.batch, operand.heads)]
    if isinstance(sizes[0], tuple):
        sizes[0] = annotate(graph.call_method("size", sizes[0]))
    return annotate(graph.call_method("expand", (node, *sizes, -1, -1)))

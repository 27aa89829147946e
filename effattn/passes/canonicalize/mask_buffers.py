"""Masks in buffers: a causal mask that a model such as GPT-2 keeps in a buffer becomes a comparison of positions.

A buffer is data, so its mask would have to be read pair by pair. But its values are known at compile time. If it is a
triangle, the part that the model slices is written as a comparison of positions, which is read like any other mask.
Every call validates this (:mod:`effattn.runtime.ops.mask_tables`). If the buffer is written later, the graph is
compiled again with the mask as data (:mod:`effattn.compiler.assumptions`). Masks that are arguments of the model are
left alone, since other calls may pass others.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from effattn.passes.canonicalize.assumed import Assumed, places_of
from effattn.passes.compilation import Compilation, Pass
from effattn.passes.graph.insertion import Inserter
from effattn.passes.graph.known_values import Known, Unknown
from effattn.passes.graph.view import GraphView, as_sympy
from effattn.runtime.ops.mask_tables import CHANGED, is_causal_buffer

_FULL = slice(None)


@dataclass(frozen=True)
class Triangle:
    """``inside`` where column <= row + diagonal, ``outside`` elsewhere."""

    diagonal: int
    inside: Any
    outside: Any


@dataclass(frozen=True)
class WrittenOut:
    """A part of a buffer, the comparison that replaces it, and the node that checks it."""

    buffer: fx.Node
    triangle: Triangle
    part: fx.Node
    mask: fx.Node
    check: fx.Node
    inserted: tuple[fx.Node, ...]


class DecomposeMaskBuffers(Pass):
    """Replaces triangles in buffers by comparisons of positions; restores the buffer where no site reads them."""

    name = "decompose mask buffers"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.masks = decompose(work.view, work.inputs)
        return bool(self.masks)

    def undo(self, work: Compilation) -> bool:
        restore_unused(work.graph, self.masks, bool(work.taken))
        if work.taken:
            work.outcome.assumed += assumed(work.graph, self.masks)
        return bool(self.masks)


def decompose(view: GraphView, inputs: Sequence[Any]) -> list[WrittenOut]:
    """Replace every part of a buffer with a triangle that the graph reads. ``view`` is stale if there is one."""
    buffers = [node for node in view.graph.nodes if node.op == "placeholder" and _may_be_mask(node)]
    known = Known(view, inputs)
    found: list[WrittenOut] = []
    for buffer in buffers:
        try:
            triangle = _triangle(known.value(buffer))
        except Unknown:
            continue
        if triangle is None:
            continue
        for user in list(buffer.users):
            if user.target is not operator.getitem:
                found.append(_write(view.graph, buffer, buffer, [user], (_FULL, _FULL), triangle))
            elif (dims := _dims(user, buffer)) is not None:
                found.append(_write(view.graph, buffer, user, list(user.users), dims, triangle))
    return found


def _write(
    graph: fx.Graph, buffer: fx.Node, part: fx.Node, readers: list[fx.Node], dims: tuple, triangle: Triangle
) -> WrittenOut:
    """``part`` of a buffer as a comparison of positions, for ``readers``."""
    held = part.meta["example_value"]
    insert = Inserter(graph, part)
    with graph.inserting_before(readers[0] if part.op == "placeholder" else part.next):
        height, width = (
            insert.method("size", part, dim) if isinstance(held.shape[dim], torch.SymInt) else held.shape[dim]
            for dim in (-2, -1)
        )
        given = dims[0] if isinstance(dims[0], fx.Node) else None
        rows = insert.call(torch.arange, height, device=held.device) if given is None else given
        diagonal: Any = triangle.diagonal
        for sign, cut in ((operator.add, dims[0]), (operator.sub, dims[1])):
            start = cut.start if isinstance(cut, slice) else None
            if start is not None and not (isinstance(start, int) and start == 0):
                numbers = not isinstance(diagonal, fx.Node) and not isinstance(start, fx.Node)
                diagonal = sign(diagonal, start) if numbers else insert.call(sign, diagonal, start)
        last = insert.call(operator.getitem, rows, (_FULL, None))
        if isinstance(diagonal, fx.Node) or diagonal != 0:
            last = insert.call(operator.add, last, diagonal)
        mask = insert.call(operator.le, insert.call(torch.arange, width, device=held.device), last)
        if held.dtype != torch.bool:
            mask = insert.method("to", insert.call(torch.where, mask, triangle.inside, triangle.outside), held.dtype)
        elif not triangle.inside:
            mask = insert.call(torch.logical_not, mask)
        if held.dim() > 2:
            mask = insert.call(operator.getitem, mask, (None,) * (held.dim() - 2))
        value = (float if held.dtype.is_floating_point else int)(triangle.inside), triangle.outside
        op = torch.ops.effattn.is_causal_buffer.default
        fits = insert.call(op, part, given, diagonal, value[0], type(value[0])(value[1]))
        check = insert.call(torch._assert_async, fits, CHANGED)
    for reader in readers:
        reader.replace_input_with(part, mask)
    return WrittenOut(buffer, triangle, part, mask, check, tuple(insert.nodes))


def restore_unused(graph: fx.Graph, written: list[WrittenOut], relied_on: bool) -> None:
    """Restore the buffer for masks that the model still reads. Checks stay if some site was replaced."""
    present = set(graph.nodes)
    for one in written:
        alive = [node for node in one.inserted if node in present]
        if one.mask in alive:
            one.mask.replace_all_uses_with(one.part)
        keep = {one.check, *one.check.all_input_nodes} if relied_on else set()
        keep |= {source for node in keep for source in node.all_input_nodes}
        for node in reversed(alive):
            if node not in keep and not node.users:
                graph.erase_node(node)


def assumed(graph: fx.Graph, written: list[WrittenOut]) -> list[Assumed]:
    """The assumptions about buffers of a graph in which sites were replaced."""
    triangles = {one.buffer: one.triangle for one in written}
    return [_assumed(buffer, triangle, *places_of(graph, {buffer})) for buffer, triangle in triangles.items()]


def _assumed(buffer: fx.Node, triangle: Triangle, place: int) -> Assumed:
    def holds(*args: Any) -> bool:
        facts = (triangle.diagonal, triangle.inside, triangle.outside)
        return bool(is_causal_buffer(args[place], None, *facts))

    name = getattr(buffer.meta["grapharg"].source, "index", None) or buffer.name
    return Assumed(f"a mask in a buffer ({name})", (place,), holds)


def _may_be_mask(node: fx.Node) -> bool:
    held, source = node.meta.get("example_value"), getattr(node.meta.get("grapharg"), "source", None)
    is_buffer = getattr(getattr(source, "base", None), "member", None) == "_buffers"
    if not is_buffer or not isinstance(held, torch.Tensor) or held.dim() < 2:
        return False
    return (
        not held.requires_grad
        and not held.is_complex()
        and all(isinstance(size, int) and size == 1 for size in held.shape[:-2])
    )


def _triangle(table: torch.Tensor) -> Triangle | None:
    """The triangle of two values in the table, or None."""
    table = table.reshape(table.shape[-2:])
    if min(table.shape) < 2:
        return None
    inside, outside = table[-1, 0].item(), table[0, -1].item()
    if inside == outside or inside != inside or outside != outside:
        return None
    first = int((table[0] == inside).sum())
    diagonal = first - 1 if first else -int((table[:, 0] == outside).sum())
    fits = is_causal_buffer(table, None, diagonal, inside, outside)
    return Triangle(diagonal, inside, outside) if bool(fits) else None


def _dims(part: fx.Node, buffer: fx.Node) -> tuple[Any, slice] | None:
    """(rows, columns) that ``part`` takes from the last two dimensions; None if it changes them in another way."""
    shape, item = buffer.meta["example_value"].shape, part.args[1]
    items = list(item) if isinstance(item, tuple) else [item]
    places = [n for n, one in enumerate(items) if one is Ellipsis]
    taken = sum(one is not None and one is not Ellipsis for one in items)
    if places:
        items[places[0] : places[0] + 1] = [_FULL] * (len(shape) - taken)
    else:
        items += [_FULL] * (len(shape) - taken)
    cut = [n for n, one in enumerate(items) if one is not None]
    if len(cut) != len(shape) or cut[-2:] != [len(items) - 2, len(items) - 1]:
        return None
    if any(not isinstance(items[n], slice) or items[n] != _FULL for n in cut[:-2]):
        return None
    rows, columns = cast(tuple[Any, Any], tuple(items[-2:]))
    if not _aligned(columns, shape[-1]):
        return None
    if isinstance(rows, fx.Node):  # one row per position, as in decode
        held = rows.meta.get("example_value")
        one_each = isinstance(held, torch.Tensor) and held.dim() == 1 and held.dtype in (torch.int64, torch.int32)
        return (rows, columns) if one_each else None
    return (rows, columns) if _aligned(rows, shape[-2]) else None


def _aligned(cut: Any, size: int) -> bool:
    """Whether a slice is known to begin at its ``start``."""
    if not isinstance(cut, slice) or cut.step not in (None, 1):
        return False
    start = cut.start
    if start is None or (isinstance(start, int) and 0 <= start <= size):
        return True
    value = start.meta.get("example_value") if isinstance(start, fx.Node) else None
    return isinstance(value, (int, torch.SymInt)) and as_sympy(value).is_nonnegative is True

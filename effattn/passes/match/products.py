"""The product of query and key behind scores: which of several it is, and the scores as a term of it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from effattn.ir import expr
from effattn.ir.expr import s
from effattn.ir.refusal import Why
from effattn.passes.candidate.record import Refused, ScoreSpace
from effattn.passes.candidate.space import Readers
from effattn.passes.diagnose.lineage import LAYERS
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.provenance import spelled
from effattn.passes.graph.view import GraphView, hint
from effattn.passes.graph.vocabulary import Call
from effattn.passes.match.sink import before_casts
from effattn.passes.symbolic import Reader, Reading
from effattn.passes.symbolic.one_place import at_one_place
from effattn.passes.symbolic.pointwise import aligned
from effattn.passes.symbolic.reader import generic_index


def query_key_product(
    view: GraphView,
    readers: Readers,
    scores: fx.Node,
    dim: int,
    time: int,
    kind: type[Reader] = Reader,
) -> tuple[Contraction, int, frozenset[int]]:
    """(the product that the scores are made of, the scores' query dimension, the other dimensions of the scores that
    only the query has)."""
    shape = view.shape(scores)
    symbols = [sympy.Symbol(f"g{n}", integer=True, nonnegative=True) for n in range(len(shape))]
    sizes = dict(zip(symbols, shape, strict=True))
    reader = readers.setdefault((kind, "product", *shape), kind(view, sizes, products=True))
    term = reader.read(scores, time).at(tuple(symbols))
    term = at_one_place(term, reader.raw)
    candidates: dict[fx.Node, tuple[Contraction, int, bool]] = {}
    alone: dict[fx.Node, frozenset[int]] = {}
    wrong_axis = ""
    for raw in [load for load in expr.loads_of(term) if load.name in reader.raw]:
        product = reader.raw[raw.name]
        entries = dict(zip(product.out_labels, map(sympy.sympify, raw.indices), strict=True))
        free = {
            side: {x for label in labels if label in entries for x in entries[label].free_symbols}
            for side, labels in (("left", product.left_labels), ("right", product.right_labels))
        }
        key_side = [side for side in free if symbols[dim] in free[side]]
        if len(key_side) != 1:
            wrong_axis = wrong_axis or (
                f"it runs over dimension {dim}, which query and key share" if len(key_side) == 2 else ""
            )
            continue
        query_side = "left" if key_side[0] == "right" else "right"
        rows = [n for n, x in enumerate(symbols) if x in free[query_side] - free[key_side[0]]]
        if rows:
            row = _query_row(rows, symbols, shape, dim, term, reader)
            plain = {symbols[dim], symbols[row]} <= set(entries.values())
            candidates[product.node] = (product, row, plain)
            alone[product.node] = frozenset(rows) - {row}
        else:
            wrong_axis = f"every query has its own {shape[dim]} of them"
    if not candidates:
        if wrong_axis:
            raise Refused(Why.AXIS, f"the softmax does not run over the keys that all queries share: {wrong_axis}")
        raise _mixing(view, reader, term, symbols[dim]) or _no_product(view, reader, term)
    product, row = _main_product(view, list(candidates.values()), time)
    return product, row, alone[product.node]


def _query_row(rows: list[int], symbols: list, shape: tuple, dim: int, term, reader: Reader) -> int:
    """The query dimension, if all heads share one key: query positions and heads are then both the query's alone.

    It is the dimension that the mask compares with the keys, or else one of symbolic length, or else the last.
    """
    compared = [
        atom
        for atom in term.atoms(sympy.core.relational.Relational, expr.Load)
        if atom.has(symbols[dim]) and not any(load.name in reader.raw for load in expr.loads_of(atom))
    ]
    masked = [n for n in rows if any(atom.has(symbols[n]) for atom in compared)]
    lengths = [n for n in rows if not sympy.sympify(shape[n]).is_Integer]
    return next((found[0] for found in (masked, lengths) if len(found) == 1), rows[-1])


def _main_product(
    view: GraphView, candidates: list[tuple[Contraction, int, bool]], time: int
) -> tuple[Contraction, int]:
    """The product that the kernel computes: the widest one of a query and a key. Others are captured and added.

    With relative positions, the others depend on queries and distances, or are gathered at distances. If each pair has
    a vector of its own (wav2vec2-bert), only heads are the query's alone, and these are further to the front. A product
    that is written before ``time`` is preferred, since capturing it would need a copy.
    """
    plain = [(product, rows) for product, rows, is_plain in candidates if is_plain]
    if len(candidates) == 1:
        return candidates[0][:2]
    if not plain:
        raise Refused(Why.SEVERAL_PRODUCTS, "the scores add several products of queries and keys", "not supported yet")

    def preference(candidate: tuple[Contraction, int]) -> tuple[bool, int, int, int]:
        product, row = candidate
        made = view.time[product.node]
        held = view.held(product.left).shape
        width = math.prod(hint(held[product.left_labels.index(label)]) for label in product.sums)
        return bool(view.writes_between(product.node, made, time)), width, row, -made

    return max(plain, key=preference)


def _no_product(view: GraphView, reader: Reader, term) -> Refused:
    """The reason why the scores cannot be read down to a product, if there is one above them."""
    between = "between the product of query and key and softmax"
    for name in [load.name for load in expr.loads_of(term) if load.name not in reader.raw]:
        node = reader.captures[name].node
        if not product_above(view, node):
            continue
        if view.cuts_gradient(node, reader.captures[name].time):
            return Refused(Why.GRADIENT, f"{spelled(node)} stops the gradient {between}", at=node)
        writers = view.writes_between(node, view.time[node], reader.captures[name].time)
        if writers:
            reason = f"{spelled(writers[-1])} writes into the scores before softmax, which is not understood"
            return Refused(Why.MEMORY, reason, at=writers[-1])
        why = f": {reader.reasons[node]}" if node in reader.reasons else ""
        return Refused(Why.NO_PRODUCT, f"{spelled(node)} stands {between} and has no symbolic meaning{why}", at=node)
    if term.is_number:
        return Refused(Why.EMPTY_MASK, "the mask allows nothing at all")
    return Refused(Why.NOT_ATTENTION, "the scores do not come from a product of two tensors: not attention")


def _mixing(view: GraphView, reader: Reader, term, key) -> Refused | None:
    """Talking heads: a layer between scores and softmax whose features are not the keys; None if there is none."""
    for load in expr.loads_of(term):
        if load.name in reader.raw:
            continue
        node = reader.captures[load.name].node
        if node.target not in (F.linear, F.conv2d) or key not in load.indices:
            continue
        if load.indices.index(key) == (len(load.indices) - 1 if node.target is F.linear else 1):  # its features
            continue
        if any(product_above(view, source) for source in node.all_input_nodes[:1]):
            reason = f"heads are mixed before the softmax (talking heads, by {spelled(node)})"
            return Refused(Why.TALKING_HEADS, reason, at=node)
    return None


def product_above(view: GraphView, node: fx.Node) -> bool:
    """Whether a product of two computed tensors is above ``node``, with no layer in between."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.target in LAYERS:
            continue
        if contraction(view, node) is not None:
            return True
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return False


def scores_at(
    view: GraphView,
    space: ScoreSpace,
    scores: fx.Node,
    time: int,
    product: Contraction,
    mask_is_data: bool = False,
):
    """The scores as a term in which s is the product, and the index at which they read the product.

    ``mask_is_data``: the last summand is captured as a tensor instead of being read.
    """
    reader = space.reader
    reading = _with_data_added(view, reader, scores, time) if mask_is_data else reader.read(scores, time)
    term = at_one_place(reading.at(space.index), reader.raw)
    raws = [load for load in expr.loads_of(term) if load.name in reader.raw]
    ours = [load for load in raws if reader.raw[load.name].node is product.node]
    if len(ours) != 1:
        raise Refused(Why.PRODUCT, "the scores read the product at several indices", at=product.node)
    swap: dict[Any, Any] = {ours[0]: s}
    for other in raws:
        if other is not ours[0]:
            node = reader.raw[other.name].node
            if (call := view.call(node)) is not None and call.name == "baddbmm":
                raise Refused(Why.SEVERAL_PRODUCTS, "the scores add several products, one of them by baddbmm", at=node)
            swap[other] = reader.as_data(node, view.time[node] + 1).at(other.indices)  # before it is written
    return term.xreplace(swap), ours[0].indices


def _with_data_added(view: GraphView, reader: Reader, scores: fx.Node, time: int) -> Reading:
    """``x + mask``, or ``x + mask + bias`` in that order, with the summands captured.

    Raises Refused if the last operation is not a float32 sum of the scores and a tensor that does not depend on them.
    """
    node, time = before_casts(view, scores, time)
    call, shape = view.call(node), view.shape(node)
    plain = call is not None and call.name == "add" and call.get("alpha", 1) == 1
    if call is None or not plain or view.writes_between(node, view.time[node], time):
        raise Refused(Why.NO_MASK, "the last operation before softmax adds no mask")
    parts = [call.get(name) for name in ("input", "other")]
    if any(view.tensor(part) is None or view.held(part).dtype != torch.float32 for part in (node, *parts)):
        raise Refused(Why.NO_MASK, "the last tensor added to the scores is no float32 mask")
    readings = [reader.argument(call, name) for name in ("input", "other")]
    masks = [not _holds_product(reader, reading) for reading in readings]
    if sum(masks) != 1:
        raise Refused(Why.NO_MASK, "the last tensor added to the scores depends on them")
    readings[masks.index(True)] = reader.as_data(parts[masks.index(True)], view.time[node])
    with contextlib.suppress(Refused):  # earlier summands
        readings[masks.index(False)] = _grouped(
            _with_data_added(view, reader, parts[masks.index(False)], view.time[node])
        )
    one, other = readings
    return Reading(shape, "float", lambda i: one.at(aligned(one, i, shape)) + other.at(aligned(other, i, shape)))


def _grouped(sum_: Reading) -> Reading:
    return Reading(sum_.shape, sum_.kind, lambda index: expr.Group(sum_.at(index)))


def _holds_product(reader: Reader, reading: Reading) -> bool:
    return any(load.name in reader.raw for load in expr.loads_of(reading.at(generic_index(len(reading.shape)))))


def adds_nothing(call: Call) -> bool:
    return call.get("beta", 1) == 0 and call.get("alpha", 1) == 1

"""A product of weights and value written by hand: ``(w[..., None] * v[:, :, None]).sum(-2)`` becomes an einsum.

The multiplication has head_dim numbers per pair of query and key, which a product avoids. If it does not become a site,
the original graph is used.
"""

from __future__ import annotations

from string import ascii_lowercase
from typing import Any

import torch
from torch import fx

from effattn.passes.canonicalize.sums_of_weights import from_softmax
from effattn.passes.compilation import Compilation, Pass, RunWithout
from effattn.passes.graph.dead_code import erase_orphans
from effattn.passes.graph.insertion import Inserter, difference
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, one_dim
from effattn.passes.match.products import product_above


class ContractWeights(Pass):
    """Writes sums of weights times value as products. If one does not become a site, the graph is compiled without."""

    name = "contract weights and value"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.products = contract(work.view)
        return bool(self.products)

    def undo(self, work: Compilation) -> bool:
        if not work.taken.issuperset(self.products):
            raise RunWithout(ContractWeights)
        return False


def contract(view: GraphView) -> list[fx.Node]:
    """Write every sum of weights times value as a product, in place. Returns the products."""
    found = {node: times for node in view.graph.nodes if (times := _weighed(view, node)) is not None}
    products = {node: product for node, times in found.items() if (product := _contracted(view, node, times))}
    if products:
        erase_orphans(GraphView(view.graph), list(products))
    return list(products.values())


def _weighed(view: GraphView, node: fx.Node) -> Call | None:
    """The multiplication in ``sum(weights * value, dim)``; None if ``node`` is not such a sum."""
    call = view.call(node)
    if call is None or call.name != "sum" or call.get("keepdim", False) is not False or call.get("dtype") is not None:
        return None
    times = view.call(call.get("input")) if isinstance(call.get("input"), fx.Node) else None
    if times is None or times.name != "mul" or len(times.node.users) != 1 or view.writes(node):
        return None
    operands = (times.get("input"), times.get("other"))
    if not all(isinstance(operand, fx.Node) and view.tensor(operand) is not None for operand in operands):
        return None
    time = view.time[node]
    steps = (times.node, *operands)
    if view.writes(times.node) or any(view.writes_between(step, view.time[times.node], time) for step in steps):
        return None
    if view.cuts_gradient(times.node, time) or not any(_are_weights(view, operand) for operand in operands):
        return None
    return times


def _are_weights(view: GraphView, node: fx.Node) -> bool:
    """Whether they come from a softmax of a product, unlike a router's weights."""
    chain = from_softmax(view, node)
    return bool(chain) and isinstance(chain[0].get("input"), fx.Node) and product_above(view, chain[0].get("input"))


def _contracted(view: GraphView, node: fx.Node, times: Call) -> fx.Node | None:
    full, call = view.shape(times.node), view.call(node)
    dim = one_dim(call.get("dim"), len(full)) if call is not None else None
    if dim is None or len(full) > len(ascii_lowercase):
        return None
    insert, terms, parts = Inserter(view.graph, node), [], []
    try:
        with view.graph.inserting_before(node):
            for name in ("input", "other"):
                part, labels = _without_ones(view, insert, times.get(name), full)
                parts.append(part)
                terms.append(labels)
            out = "".join(letter for place, letter in enumerate(ascii_lowercase[: len(full)]) if place != dim)
            product = insert.call(torch.einsum, f"{terms[0]},{terms[1]}->{out}", *parts)
    except RuntimeError:  # dtypes that einsum does not promote
        insert.undo()
        return None
    summed = all(ascii_lowercase[dim] in labels for labels in terms)
    if not summed or difference(node.meta["example_value"], product.meta["example_value"]):
        insert.undo()
        return None
    node.replace_all_uses_with(product)
    return product


def _without_ones(view: GraphView, insert: Inserter, part: fx.Node, full: tuple[Any, ...]) -> tuple[fx.Node, str]:
    """A factor without its broadcast dimensions, and a letter for each of the others."""
    sizes = view.shape(part)
    letters = ascii_lowercase[len(full) - len(sizes) : len(full)]
    ones = [n for n, (size, wide) in enumerate(zip(sizes, full[-len(sizes) :], strict=True)) if size == 1 != wide]
    for place in reversed(ones):
        part = insert.method("squeeze", part, place)
    return part, "".join(letter for place, letter in enumerate(letters) if place not in ones)

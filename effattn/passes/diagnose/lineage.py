"""The operations between two products, whether they can be read or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import fx

from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.provenance import is_state
from effattn.passes.graph.view import GraphView

_FURTHEST = 64  # most operations between a product and a tensor computed from it
# products with weights; their results are not products of queries and keys
LAYERS = (F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d, F.bilinear, torch.addmm)


def nearest_products(
    view: GraphView, node: fx.Node, through: Iterable[Callable] = (), until: Callable[[fx.Node], bool] | None = None
) -> tuple[list[Contraction], set[fx.Node]] | None:
    """(the nearest products above ``node``, all nodes in between). ``through``: layers to pass.

    None if ``until`` holds for one of these nodes.
    """
    products: list[Contraction] = []
    below: set[fx.Node] = set()
    waiting = [node]
    while waiting and len(below) < _FURTHEST:
        node = waiting.pop()
        if node in below or node.op not in ("call_function", "call_method"):
            continue
        if until is not None and until(node):
            return None
        if node.target in LAYERS and node.target not in through:
            continue
        if (product := contraction(view, node)) is not None:
            products.append(product)
            continue
        below.add(node)
        waiting += [source for source in node.all_input_nodes if view.value(source) is not None]
    return products, below


def made_of(view: GraphView, source: fx.Node, below: set[fx.Node]) -> list[fx.Node]:
    """The nodes of ``below`` that are computed from ``source``, in graph order."""
    found = {source}
    for node in sorted(below, key=view.time.__getitem__):
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return sorted(found - {source}, key=view.time.__getitem__)


def computed(view: GraphView, node: fx.Node) -> bool:
    """Whether a tensor depends on the model's inputs, not only on parameters and buffers."""
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder" and view.tensor(node) is not None and not is_state(node):
            return True
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return False


def scores_each_pair(view: GraphView, product: Contraction) -> bool:
    """Whether each row of one operand meets each row of the other, and neither is a layer's weight."""
    left, right = set(product.left_labels), set(product.right_labels)
    own = [(set(product.out_labels) & one) - other for one, other in ((left, right), (right, left))]
    return all(own) and computed(view, product.left) and computed(view, product.right)


def users_of_weights(view: GraphView, weights: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(node, user) for all uses of weights, through arithmetic and views up to products, sums and selections."""
    waiting, seen = [weights], {weights}
    while waiting and len(seen) < _FURTHEST:
        node = waiting.pop(0)
        for user in node.users:
            yield node, user
            call = view.call(user)
            goes_on = (call is not None and call.name not in ("sum", "softmax", "max", "min")) or user.target in LAYERS
            if goes_on and contraction(view, user) is None and user not in seen:
                seen.add(user)
                waiting.append(user)

"""Weights that are added before the product with value: ``(a1 - x * a2) @ v`` becomes ``a1 @ v - x * (a2 @ v)``.

Differential Transformer (arXiv 2410.05258, section 2.1) thus is two attentions over one value. If one of the parts does
not become a site, the original graph is used, since two products cost more than one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effattn.passes.compilation import Compilation, Pass, RunWithout
from effattn.passes.graph.contraction import contraction
from effattn.passes.graph.dead_code import erase_orphans
from effattn.passes.graph.insertion import Inserter, difference
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call, is_dead_dropout
from effattn.passes.symbolic.views import reinterprets

# operations allowed between a softmax and a sum
_PASSED = ("identity", "dropout", "reshape", "transpose", "permute", "select", "getitem")
_SIGNS = {"add": 1, "sub": -1}


@dataclass(frozen=True)
class _Term:
    """One summand: ``sign * factor * weights``; ``factor`` None is 1."""

    weights: fx.Node
    factor: Any = None
    sign: int = 1


class DistributeSums(Pass):
    """Distributes products of sums of weights. If a part does not become a site, the graph is compiled without it."""

    name = "distribute sums of weights"
    optional = True

    def apply(self, work: Compilation) -> bool:
        self.products = decompose(work.view)
        return bool(self.products)

    def undo(self, work: Compilation) -> bool:
        if not work.taken.issuperset(self.products):
            raise RunWithout(DistributeSums)
        return False


def decompose(view: GraphView) -> list[fx.Node]:
    """Distribute every product of a sum of weights, in place. Returns the nodes that have to become sites.

    They include a softmax that still has users, since it would then cost as much as before. If there are none, the
    graph and ``view`` are unchanged.
    """
    products: list[fx.Node] = []
    shared: list[fx.Node] = []
    sums = {node: terms for node in view.graph.nodes if (terms := _terms_of(view, node))}
    for node, terms in sums.items():
        own = [_with_own_softmax(view, term) for term in terms]
        shared += [
            from_softmax(view, old.weights)[0].node for old, new in zip(terms, own, strict=True) if new is not old
        ]
        products += _distributed(view.graph, node, own)
    if products or shared:
        erase_orphans(GraphView(view.graph), [node for node in sums if not node.users])
    return products + [softmax for softmax in shared if softmax.users]


def _terms_of(view: GraphView, node: fx.Node) -> list[_Term]:
    """The summands of the weights that ``node`` multiplies with value; [] if it does not multiply a sum."""
    call, product = view.call(node), contraction(view, node)
    if call is None or call.name != "matmul" or product is None or view.writes(node):
        return []
    terms = _summands(view, product.left, view.time[node])
    return terms if len(terms) > 1 and all(from_softmax(view, term.weights) for term in terms) else []


def _summands(view: GraphView, node: fx.Node, time: int) -> list[_Term]:
    """``node`` as a sum, read at ``time``; [] if a part of it cannot be moved behind the product."""
    call = view.call(node)
    if call is not None and (call.name == "identity" or is_dead_dropout(call)):
        source = call.get("input")
        plain = isinstance(source, fx.Node) and len(node.users) == 1 and _moves(view, node, time)
        return _summands(view, source, time) if plain else [_Term(node)]
    if call is None or call.name not in _SIGNS or len(node.users) != 1 or not _moves(view, node, time):
        return [_Term(node)]
    if call.get("alpha", 1) != 1:
        return []
    found: list[_Term] = []
    if call.get("input") is call.get("other"):
        return []  # the same weights twice
    for name, sign in (("input", 1), ("other", _SIGNS[call.name])):
        part = call.get(name)
        if not isinstance(part, fx.Node) or view.tensor(part) is None or view.shape(part) != view.shape(node):
            return []
        inner = [_scaled(view, term, node, time) for term in _summands(view, part, time)]
        if not inner or None in inner:
            return []
        found += [_Term(term.weights, term.factor, sign * term.sign) for term in inner if term is not None]
    return found


def _scaled(view: GraphView, term: _Term, like: fx.Node, time: int) -> _Term | None:
    """The term with a factor split off its weights; None if it has one that cannot be."""
    call = view.call(term.weights)
    if call is None or call.name != "mul":
        return term
    if term.factor is not None or len(term.weights.users) != 1 or not _moves(view, term.weights, time):
        return None
    for name, other in (("input", "other"), ("other", "input")):
        weights, factor = call.get(name), call.get(other)
        if not isinstance(weights, fx.Node) or view.tensor(weights) is None or not from_softmax(view, weights):
            continue
        if view.shape(weights) == view.shape(like) and _is_factor(view, factor, view.time[term.weights], time):
            return _Term(weights, factor, term.sign)
    return None


def _is_factor(view: GraphView, factor: Any, read: int, time: int) -> bool:
    """Whether a factor is the same for all keys of a query, and unchanged at ``time``."""
    if isinstance(factor, (int, float)):
        return True
    if not isinstance(factor, fx.Node) or view.tensor(factor) is None:
        return False
    return view.shape(factor)[-1:] in ((), (1,)) and not view.writes_between(factor, read, time)


def from_softmax(view: GraphView, node: fx.Node) -> list[Call]:
    """The softmax that weights come from, and the views and casts after it; [] if there is none."""
    chain: list[Call] = []
    while (call := view.call(node)) is not None:
        chain.insert(0, call)
        if call.name == "softmax":
            return chain
        node = call.get("input")
        if not (call.name in _PASSED or call.casts) or not isinstance(node, fx.Node):
            return []
    return []


def _with_own_softmax(view: GraphView, term: _Term) -> _Term:
    """The term with its own softmax, if it takes some heads of one: a softmax of these heads' scores.

    In the published code the two are adjacent heads: ``w = softmax(s).view(b, h, 2, n, n); w[:, :, 0]``.
    """
    call, *chain = from_softmax(view, term.weights)
    if not any(link.name in ("getitem", "select") for link in chain):
        return term
    scores, rank = call.get("input"), len(view.shape(call.node))
    dim = call.get("dim")
    if not isinstance(scores, fx.Node) or not isinstance(dim, int) or dim % rank != rank - 1:
        return term
    if view.writes_between(scores, view.time[call.node], view.time[term.weights]):
        return term
    if not all(_is_cast(link) or _keeps_rows(view, link) for link in chain):
        return term
    insert = Inserter(view.graph, term.weights)
    with view.graph.inserting_before(term.weights):
        try:
            for link in chain:
                if not _is_cast(link):
                    scores = _again(insert, link, scores)
            softmax = torch._safe_softmax if call.get("safe") else torch.softmax
            weights = insert.call(softmax, scores, -1, dtype=call.get("dtype"))
            for link in chain:
                if _is_cast(link):
                    weights = _again(insert, link, weights)
        except RuntimeError:  # the scores' memory order does not allow the view
            insert.undo()
            return term
    return _Term(weights, term.factor, term.sign)


def _is_cast(call: Call) -> bool:
    return call.casts or call.name == "identity"


def _keeps_rows(view: GraphView, call: Call) -> bool:
    """Whether a view leaves the last two dimensions, queries and keys, unchanged."""
    before, after = view.shape(call.get("input")), view.shape(call.node)
    if len(after) < 2 or before[-2:] != after[-2:]:
        return False
    if call.name == "reshape":
        return not reinterprets(view, call)
    index = call.get("index")
    if call.name == "select":
        return isinstance(call.get("dim"), int) and call.get("dim") % len(before) < len(before) - 2
    index = index if isinstance(index, tuple) else (index,)
    plain = all(isinstance(part, int) or part == slice(None) for part in index)
    return call.name == "getitem" and plain and not any(isinstance(part, int) for part in index[len(before) - 2 :])


def _again(insert: Inserter, call: Call, source: fx.Node) -> fx.Node:
    """The same call on another tensor."""
    args, kwargs = fx.map_arg((call.node.args, call.node.kwargs), lambda n: source if n is call.get("input") else n)
    return insert.annotate(insert.graph.create_node(call.node.op, call.node.target, args, kwargs))


def _moves(view: GraphView, node: fx.Node, time: int) -> bool:
    """Whether ``node`` may be computed at ``time`` instead."""
    if view.writes(node) or view.cuts_gradient(node, time):
        return False
    return not any(view.writes_between(part, view.time[node], time) for part in (node, *node.all_input_nodes))


def _distributed(graph: fx.Graph, node: fx.Node, terms: list[_Term]) -> list[fx.Node]:
    """Insert one product per term and their sum instead of ``node``. Returns the products, [] if that is not
    possible."""
    value = node.args[1] if len(node.args) > 1 else node.kwargs.get("other", node.kwargs.get("mat2"))
    insert = Inserter(graph, node)
    products: list[fx.Node] = []
    total: fx.Node | None = None
    try:
        with graph.inserting_before(node):
            for term in terms:
                part = insert.call(torch.matmul, term.weights, value)
                products.append(part)
                if term.factor is not None:
                    part = insert.call(operator.mul, part, term.factor)
                if total is None:
                    total = part if term.sign > 0 else insert.call(operator.neg, part)
                else:
                    total = insert.call(operator.add if term.sign > 0 else operator.sub, total, part)
    except RuntimeError:  # dtypes that need autocast
        total = None
    if total is None or difference(node.meta["example_value"], total.meta["example_value"]):
        insert.undo()
        return []
    node.replace_all_uses_with(total)
    return products

"""Better reasons for softmaxes that are left alone: what their scores and weights are, beyond where reading stopped.

A row of ``DIAGNOSES`` examines softmaxes that failed one of its rules, and gives a better refusal, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx

from effattn.ir import expr
from effattn.ir.refusal import Refusal, Why
from effattn.passes.candidate.record import Refused
from effattn.passes.diagnose.lineage import computed, made_of, nearest_products, scores_each_pair, users_of_weights
from effattn.passes.diagnose.not_softmax import CHOOSING, name_of
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.provenance import spelled
from effattn.passes.graph.view import GraphView
from effattn.passes.graph.vocabulary import Call
from effattn.passes.symbolic import CaptureSource
from effattn.passes.symbolic.views import permutation


@dataclass(frozen=True)
class Softmax:
    """A softmax that is left alone."""

    view: GraphView
    node: fx.Node
    scores: fx.Node
    dim: int
    products: tuple[Contraction, ...]  # nearest above the scores
    below: frozenset[fx.Node]  # nodes in between

    @property
    def size(self) -> Any:
        return self.view.shape(self.scores)[self.dim]

    def made_of_scores(self) -> list[fx.Node]:
        return [node for product in self.products for node in made_of(self.view, product.node, set(self.below))]


def truer(view: GraphView, call: Call, refusal: Refusal) -> Refusal:
    """The refusal of a softmax, or a better one."""
    scores = call.get("input")
    if not isinstance(scores, fx.Node) or not isinstance(call.get("dim"), int) or not view.shape(scores):
        return refusal
    found = nearest_products(view, scores)
    products, below = found if found is not None else ([], set())
    dim = call.get("dim") % len(view.shape(scores))
    softmax = Softmax(view, call.node, scores, dim, tuple(products), frozenset(below))
    for diagnosis in DIAGNOSES:
        if refusal.rule in diagnosis.rules and (better := diagnosis.test(softmax)) is not None:
            return better.refusal
    return refusal


def _mixed_before(softmax: Softmax) -> Refused | None:
    """``einsum("bhqk,hg->bgqk", scores, mixing)``: an operand of the nearest product already has query and key."""
    for mixing in softmax.products:
        for side, other in (("left", "right"), ("right", "left")):
            node, labels = mixing.operand(side)
            own = [label for label in labels if label in mixing.out_labels and label not in mixing.operand(other)[1]]
            above = nearest_products(softmax.view, node)
            if len(own) < 2 or above is None or not any(scores_each_pair(softmax.view, one) for one in above[0]):
                continue
            return Refused(Why.TALKING_HEADS, "heads are mixed before the softmax (talking heads)", at=mixing.node)
    return None


def _mixed_after(softmax: Softmax) -> Refused | None:
    """A product, layer or convolution of weights that sums over heads."""
    view, node, order = softmax.view, softmax.node, list(range(len(softmax.view.shape(softmax.node))))
    if not any(scores_each_pair(view, product) for product in softmax.products):
        return None
    while len(users := [user for user in node.users if view.tensor(user) is not None]) == 1:
        (user,) = users
        reason = "heads are mixed after the softmax (talking heads)"
        if (product := contraction(view, user)) is not None:
            side = "left" if product.left is node else "right"
            labels = product.operand(side)[1]
            over, out = {order[labels.index(label)] for label in product.sums}, set(product.out_labels)
            rows = [dim for dim in range(len(order)) if dim != softmax.dim][-1]  # queries, if heads come first
            mixes = not over & {softmax.dim, rows} and labels[order.index(softmax.dim)] in out
            return Refused(Why.TALKING_HEADS, reason, at=user) if mixes else None
        if user.target in (F.linear, F.conv2d, F.conv1d):
            features = order[-1 if user.target is F.linear else 1]
            return Refused(Why.TALKING_HEADS, reason, at=user) if features != softmax.dim else None
        call = view.call(user)
        if call is None:
            return None
        if (moved := permutation(call, len(order))) is not None:
            order = [order[old] for old in moved]
        elif not (call.casts or call.name in ("identity", "dropout")):
            return None
        node = user
    return None


def _router(softmax: Softmax) -> Refused | None:
    """Scores of inputs with rows of a parameter: experts, classes, clusters."""
    for product in softmax.products:
        shape = dict(zip(product.out_labels, softmax.view.shape(product.node), strict=True))
        for side, other in (("left", "right"), ("right", "left")):
            node, labels = product.operand(side)
            own = [label for label in labels if label in shape and label not in product.operand(other)[1]]
            rows = [label for label in product.operand(other)[1] if label in shape and label not in labels]
            is_key = any(shape[label] == softmax.size for label in own)
            if computed(softmax.view, node) or not is_key or any(shape[label] == softmax.size for label in rows):
                continue
            return Refused(
                Why.NOT_ATTENTION, "the keys are a parameter: a router or classifier, not attention", at=product.node
            )
    return None


def _mixture(softmax: Softmax) -> Refused | None:
    """A weighted mean of stacked tensors: outputs of layers or experts."""
    for product in softmax.products:
        for side in ("left", "right"):
            node = product.operand(side)[0]
            while (call := softmax.view.call(node)) is not None and len(node.all_input_nodes) == 1:
                if call.name not in ("permute", "transpose", "movedim", "identity", "reshape", "getattr"):
                    break
                node = node.all_input_nodes[0]
            parts = node.args[0] if node.target is torch.stack and node.args else ()
            if isinstance(parts, (list, tuple)) and softmax.size == len(parts):
                reason = f"it weighs {len(parts)} tensors that are stacked: a mixture, not attention"
                return Refused(Why.NOT_ATTENTION, reason, at=node)
    return None


def chosen_by(nodes: list[fx.Node]) -> Refused | None:
    """The refusal of a mask or bias that ``nodes`` compute from the scores, if one of them compares scores."""
    for node in nodes:
        if name_of(node) in CHOOSING:
            return Refused(Why.CHOSEN_KEYS, f"keys are chosen by the scores themselves ({spelled(node)})", at=node)
    return None


def require_free_of_scores(view: GraphView, term: Any, captures: dict[str, CaptureSource], product: fx.Node) -> None:
    """Raises Refused if a captured tensor is selected by the scores, which would then be computed twice."""
    for name in {load.name for load in expr.loads_of(term)} & set(captures):
        _, below = nearest_products(view, captures[name].node) or ([], set())
        if (refused := chosen_by(made_of(view, product, below))) is not None:
            raise refused


def _chosen_by_scores(softmax: Softmax) -> Refused | None:
    return chosen_by(softmax.made_of_scores())


def _chosen_by_weights(softmax: Softmax) -> Refused | None:
    for _, user in users_of_weights(softmax.view, softmax.node):
        if name_of(user) in CHOOSING:
            return Refused(Why.CHOSEN_KEYS, f"keys are chosen by the weights ({spelled(user)})", at=user)
    return None


def _pairwise(softmax: Softmax) -> Refused | None:
    """Distances, and sums of query and key (additive attention): a value per pair, but no product."""
    view = softmax.view
    found = nearest_products(view, softmax.scores, through=(F.linear,))
    if found is None or not _meets_value(softmax):
        return None
    rows = softmax.size
    for node in sorted(found[1], key=view.time.__getitem__, reverse=True):
        operands = [source for source in node.all_input_nodes if view.tensor(source) is not None]
        if len(operands) != 2 or not all(computed(view, operand) for operand in operands):
            continue
        if name_of(node) == "cdist":
            return Refused(Why.PAIRWISE, "the scores are distances (cdist), not products of query and key", at=node)
        call = view.call(node)
        if call is None or call.name not in ("add", "sub") or not _spreads(view, node, operands, rows):
            continue
        what = "differences" if call.name == "sub" else "sums"
        return Refused(Why.PAIRWISE, f"the scores are {what} of query and key, not products", at=node)
    return None


def _spreads(view: GraphView, node: fx.Node, operands: list[fx.Node], keys: Any) -> bool:
    """Whether each row of one operand meets each row of the other: both are broadcast, one of them over the keys."""
    out = view.shape(node)
    alone = []
    for operand in operands:
        shape = (sympy.Integer(1),) * (len(out) - len(view.shape(operand))) + view.shape(operand)
        alone.append([size for size, full in zip(shape, out, strict=True) if size == 1 != full])
    over = [full for full in out if full == keys]
    return all(alone) and bool(over)


def _meets_value(softmax: Softmax) -> bool:
    """Whether the weights are multiplied with something and summed."""
    view = softmax.view
    multiplied: set[fx.Node] = set()
    for node, user in users_of_weights(view, softmax.node):
        call = view.call(user)
        if contraction(view, user) is not None or (call is not None and call.name == "sum" and node in multiplied):
            return True
        if (call is not None and call.name == "mul" and len(user.all_input_nodes) == 2) or node in multiplied:
            multiplied.add(user)
    return False


def _no_value(softmax: Softmax) -> Refused | None:
    end = getattr(softmax.view.graph.owning_module, "compile_subgraph_reason", None)
    if _meets_value(softmax) or (end is not None and end.graph_break):
        return None
    return Refused(Why.NOT_ATTENTION, "its weights are not multiplied with a value: not attention")


@dataclass(frozen=True)
class Diagnosis:
    """A better reason for softmaxes that failed one of ``rules``."""

    name: str
    rules: frozenset[Why]
    test: Callable[[Softmax], Refused | None]


_AFTER = frozenset({Why.WEIGHTS, Why.VALUE, Why.OPERANDS})
_BEFORE = frozenset({Why.NO_PRODUCT, Why.PRODUCT, Why.SCORE_AND_MASK, Why.OPERANDS, Why.LENGTHS, Why.HEADS})
DIAGNOSES = (
    Diagnosis("talking heads, before", _BEFORE | _AFTER, _mixed_before),
    Diagnosis("talking heads, after", _AFTER, _mixed_after),
    Diagnosis("router", _AFTER | {Why.AXIS, Why.CHOSEN_KEYS}, _router),
    Diagnosis("mixture", _AFTER | {Why.AXIS}, _mixture),
    Diagnosis("keys chosen by scores", _BEFORE, _chosen_by_scores),
    Diagnosis("keys chosen by weights", frozenset({Why.WEIGHTS}), _chosen_by_weights),
    Diagnosis("pairwise scores", frozenset({Why.NOT_ATTENTION}), _pairwise),
    Diagnosis("no value", frozenset({Why.WEIGHTS, Why.NO_PRODUCT}), _no_value),
)

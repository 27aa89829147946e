"""Reasons for attention whose weights are not a softmax: a sigmoid, a top-k choice, a softmax in chunks.

From each product of two tensors, one operand is followed upwards to another product. The operations in between are
compared by name only; the first row of ``KINDS`` that contains one gives the reason.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from effattn.ir.refusal import Refusal, Why
from effattn.passes.candidate.record import Refused
from effattn.passes.diagnose.lineage import computed, made_of, nearest_products, scores_each_pair
from effattn.passes.graph.contraction import Contraction, contraction
from effattn.passes.graph.provenance import spelled
from effattn.passes.graph.view import GraphView

CHOOSING = frozenset(
    {"topk", "kthvalue", "sort", "argsort", "msort", "argmax", "argmin", "one_hot", "median", "quantile"}
)


@dataclass(frozen=True)
class Kind:
    """Operations by name, and the reason if weights are made of scores by one of them."""

    names: frozenset[str]
    reason: str  # {}: the operation
    why: Why = Why.NO_SOFTMAX
    divided: str = ""  # the reason if a sum of the weights is computed too; "": the same
    hint: str = ""
    unless: frozenset[str] = frozenset()  # does not apply together with one of these


_UNLIKE = "{} instead of a softmax: the weights are not normalised over keys"
_SUMS = frozenset({"sum", "normalize"})
_ACTIVATIONS = frozenset(
    {"sigmoid", "hardsigmoid", "tanh", "relu", "relu6", "leaky_relu", "gelu", "silu", "elu", "selu", "celu"}
    | {"softplus", "mish", "square", "hardtanh", "threshold", "normalize"}
)
KINDS = (
    Kind(frozenset({"gumbel_softmax", "bernoulli", "multinomial"}), "{} draws the weights at random", Why.RANDOM),
    Kind(
        frozenset({"sort", "cumsum"}), reason="{} of the scores instead of a softmax (sparsemax, entmax and their like)"
    ),
    Kind(CHOOSING, "keys are chosen by the scores themselves ({})", Why.CHOSEN_KEYS),
    Kind(
        frozenset({"exp", "exp2"}),
        reason="{} of the scores is not divided by its sum over all keys: a softmax over chunks of keys, or no softmax",
        divided="{} of the scores is divided by a sum, but not as a softmax is",
        hint="compute the softmax over all keys at once",
    ),
    Kind(frozenset({"log_softmax"}), reason="{} instead of a softmax: the weights are logarithms"),
    Kind(_ACTIVATIONS, _UNLIKE, divided="{} instead of a softmax"),
    Kind(frozenset({"clamp", "clip"}), _UNLIKE, unless=_SUMS),
    Kind(frozenset({"autograd_function_apply"}), reason="a torch.autograd.Function computes weights from the scores"),
)


def why_no_softmax(view: GraphView, node: fx.Node, told: Container[fx.Node]) -> Refusal | None:
    """Why the attention that ends in the product ``node`` is left alone; None if it does not end one.

    ``told``: softmaxes and products that the report already covers.
    """
    product = contraction(view, node)
    if product is None or node in told:
        return None
    return _why(view, product, "left", told) or _why(view, product, "right", told)


def _why(view: GraphView, product: Contraction, side: str, told: Container[fx.Node]) -> Refusal | None:
    weights, labels = product.operand(side)
    value, of_value = product.operand("right" if side == "left" else "left")
    found = nearest_products(view, weights, until=lambda node: node in told or _is_softmax(view, node))
    if found is None:
        return None
    products, below = found
    if product.summed is None or not _has_own_dim(view, value, of_value, labels):
        return None
    keys = view.shape(weights)[labels.index(product.summed)]
    for scores in products:
        made = made_of(view, scores.node, below)
        names = {name_of(node) for node in made}
        kind = next((kind for kind in KINDS if kind.names & names and not kind.unless & names), None)
        if kind is None or not _are_keys(view, scores, keys) or not scores_each_pair(view, scores):
            continue
        if value is weights or value is scores.node or not computed(view, value):
            continue
        operation = next(node for node in made if name_of(node) in kind.names)
        reason = ((names & _SUMS and kind.divided) or kind.reason).format(spelled(operation))
        return Refused(kind.why, reason, kind.hint, at=operation).refusal
    return None


def _has_own_dim(view: GraphView, value: fx.Node, of_value: tuple, of_weights: tuple) -> bool:
    """Whether a value has a head_dim. Scores of heads that are added with one weight each (an indexer) have none."""
    return any(label not in of_weights and size != 1 for label, size in zip(of_value, view.shape(value), strict=True))


def _is_softmax(view: GraphView, node: fx.Node) -> bool:
    call = view.call(node)
    return call is not None and call.name in ("softmax", "sdpa", "flex_attention")


def _are_keys(view: GraphView, scores: Contraction, keys: object) -> bool:
    """Whether a dimension of the scores that only one operand has is as long as the dimension summed over."""
    left, right = set(scores.left_labels), set(scores.right_labels)
    shape = view.shape(scores.node)
    return any(
        size == keys
        for label, size in zip(scores.out_labels, shape, strict=True)
        if (label in left) != (label in right)
    )


def name_of(node: fx.Node) -> str:
    """The name of a function or method, without underscores of in-place variants."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target)).strip("_")

"""Checks whether an op can compute a candidate; each raises Refused with its reason."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effattn.ir.expr import k, q
from effattn.ir.refusal import Why
from effattn.ir.site import Layout
from effattn.passes.candidate.record import Candidate, Refused
from effattn.passes.graph.provenance import spelled
from effattn.passes.graph.sizes import equal, is_broadcast
from effattn.passes.graph.view import GraphView

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_recorded(view: GraphView, candidate: Candidate) -> None:
    """Refuse tensors of torch.func and tensor subclasses.

    Under vmap, grad and jvp Dynamo records torch.func's wrappers, whose inside an op would see. Subclasses that hold
    other tensors would each have to define what the op means for them.
    """
    nodes = candidate.nodes
    tensors = (nodes.replaced, *(operand.node for operand in nodes.operands.values()))
    leaves = [leaf for node in tensors for leaf in pytree.tree_leaves(view.value(node))]
    for leaf in leaves:
        if is_traceable_wrapper_subclass(leaf):
            raise Refused(Why.SUBCLASS, f"its tensors are {type(leaf).__name__}s, a subclass that holds other tensors")
    if any(isinstance(leaf, torch.Tensor) and getattr(leaf, "fake_mode", None) is None for leaf in leaves):
        raise Refused(
            Why.TORCH_FUNC, "it runs inside a transformation of torch.func (vmap, grad, jvp)", "not supported yet"
        )


def check_gradients(view: GraphView, candidate: Candidate) -> None:
    """The op's gradient reaches query and key whenever they need one, so user code's must do so too."""
    nodes = candidate.nodes
    if not view.gradient_flows(view.time[nodes.replaced]):
        return
    query, key, value = (view.held(operand.node).requires_grad for operand in nodes.operands.values())
    stops = (query or key or value) and not view.held(nodes.replaced).requires_grad
    weights = view.tensor(nodes.anchor)
    if stops or (nodes.anchor is not nodes.replaced and weights is not None and (query or key) > weights.requires_grad):
        raise Refused(Why.GRADIENT, "the gradient is stopped between query and key and the output (detach or no_grad)")


def check_operands(view: GraphView, candidate: Candidate, layout: Layout) -> None:
    _check_lengths(view, candidate)
    nodes = candidate.nodes
    end = view.time[nodes.replaced]
    for name, operand in nodes.operands.items():
        if writers := view.writes_between(operand.node, operand.time - 1, end):
            reason = f"{name} is written between the scores and the output (by {spelled(writers[0])})"
            raise Refused(Why.MEMORY, reason, at=writers[0])
        size = layout.batch if operand.dims[0] is None else operand.shape(view)[operand.dims[0]]
        if is_broadcast(view, size, layout.batch) is not False:  # operands without a batch have been expanded
            raise Refused(Why.BATCH, f"{name} has a batch of {size} where the scores have {layout.batch}")
    if nodes.query.groups != 1 or (nodes.query.dims[1] and nodes.query.heads_in(view) != layout.heads):
        raise Refused(Why.HEADS, "the query has fewer heads than the scores")
    key_heads, value_heads = nodes.key.heads_in(view), nodes.value.heads_in(view)
    if key_heads != value_heads:
        raise Refused(Why.HEADS, f"key has {key_heads} heads and value {value_heads}")
    if not (layout.heads.is_Integer and key_heads.is_Integer) or int(layout.heads) % int(key_heads):
        raise Refused(Why.HEADS, f"{layout.heads} query heads over {key_heads} key heads")
    for operand in (nodes.key, nodes.value):
        grouped = operand.groups if operand.dims[1] else int(layout.heads)
        if grouped * int(key_heads) != int(layout.heads):
            raise Refused(Why.HEADS, "query heads do not map to key heads in groups of equal size")
    dtypes = {view.held(operand.node).dtype for operand in nodes.operands.values()}
    target = view.held(nodes.replaced).dtype
    if target not in SUPPORTED_DTYPES:
        raise Refused(Why.DTYPE, f"attention in {target} is not supported")
    scores = (view.tensor(node) for node in (nodes.anchor, *nodes.anchor.all_input_nodes[:1]))
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in scores):
        raise Refused(Why.DTYPE, "the scores are computed in torch.float64, which is not supported")
    if dtypes != {target} and nodes.sdpa is None and not candidate.autocast:
        raise Refused(
            Why.DTYPE, f"query, key and value mix {', '.join(sorted(map(str, dtypes)))} for a {target} result"
        )
    if not (layout.head_dim.is_Integer and layout.value_dim.is_Integer):
        raise Refused(Why.HEAD_DIM, "head_dim is not a constant")
    if any(size == 0 for size in vars(layout).values()):
        raise Refused(Why.EMPTY, "a length is 0")


def _check_lengths(view: GraphView, candidate: Candidate) -> None:
    """Refuse scores that are concatenated from several products, and so have more queries or keys than one of them."""
    nodes = candidate.nodes
    if nodes.scores is None:
        return
    sizes = dict(zip(candidate.space.index, view.shape(nodes.scores.node), strict=True))
    for (name, operand), symbol in zip(nodes.operands.items(), (q, k, k), strict=True):
        rows = operand.shape(view)[operand.dims[2]]
        if not equal(view, rows, sizes[symbol]):
            raise Refused(Why.LENGTHS, f"{name} has {rows} rows where the scores have {sizes[symbol]}")

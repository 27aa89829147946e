"""The op ``torch.ops.effattn.block_map``: the block map of a mask, once for all layers that share it.

    block_map(query, key, captures, scalars, numbers, plan) -> (kv_indices, kv_num_blocks, partial)

Of query and key only sizes and device are read. ``plan`` holds the rule alone
(:func:`effattn.lowering.iteration.block_rule.rule_alone`) and the sizes of the blocks, so that equal masks have equal
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.lowering.iteration.block_rule import block_rule
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.selection.block_map import Wanted
from effattn.runtime.selection.triton_block_map import block_map as made

SCHEMAS = {
    "block_map": (
        "(Tensor query, Tensor key, Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}


def block_map(
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
    plan: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a :class:`~effattn.runtime.selection.block_list.BlockList` for every block of queries.

    kv_indices has its last two dimensions as one: for a tensor of four, PyTorch compares symbolic sizes to tell whether
    it is in channels-last order, and graphs are compiled again where a size becomes 1.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D].
        captures, scalars, numbers: in the plan's order.
        plan: the result of :meth:`Plan.encode`, with the sizes of the blocks.
    """
    decoded = Plan.decode(plan)
    assert decoded.sparsity.blocks is not None
    sizes = (*query.shape[:3], key.shape[2])
    found = made(Wanted(decoded.spec, sizes, captures, scalars, numbers, *decoded.sparsity.blocks, query.device))
    return found.kv_indices.flatten(2), found.kv_num_blocks, found.partial


def block_map_fake(query, key, captures, scalars, numbers, plan):
    """Empty tensors with the sizes of :func:`block_map`, for any symbolic sizes."""
    decoded = Plan.decode(plan)
    assert decoded.sparsity.blocks is not None
    rule, (block, unit) = block_rule(decoded.spec.rule), decoded.sparsity.blocks
    batches, heads = query.shape[0] if rule.by_batch else 1, query.shape[1] if rule.by_head else 1
    rows, columns = (query.shape[2] + block - 1) // block, (key.shape[2] + unit - 1) // unit
    shapes = ((batches, heads, rows * columns), (batches, heads, rows), (batches, heads, rows))
    return tuple(query.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _no_gradient(ctx, *grads):
    """Block numbers have none."""
    return None, None, [None] * ctx.captures, None, None, None


def _setup_context(ctx, inputs, output) -> None:
    ctx.captures = len(inputs[2])
    ctx.mark_non_differentiable(*output)


OPS = {"block_map": Op(SCHEMAS["block_map"], block_map, block_map_fake, _no_gradient, _setup_context)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

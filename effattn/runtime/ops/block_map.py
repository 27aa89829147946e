"""The op ``torch.ops.effattn.block_map``: the block map of a mask, once for all layers that share it.

    block_map(query, key, captures, scalars, numbers, plan) -> parts

Of query and key only sizes and device are read. ``plan`` holds the rule alone
(:func:`effattn.lowering.iteration.block_rule.rule_alone`) and the sizes of the blocks, so that equal masks have equal
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effattn.ir.plan import Plan
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.selection.block_list import sizes_of_parts
from effattn.runtime.selection.block_map import Wanted
from effattn.runtime.selection.triton_block_map import parts_of_map

SCHEMAS = {
    "block_map": (
        "(Tensor query, Tensor key, Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan) -> Tensor"
    ),
}


def block_map(
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
    plan: str,
) -> Tensor:
    """The tensors of a :class:`~effattn.runtime.selection.block_list.BlockList` for every block of queries.

    They lie one behind another in one tensor, int32 with one dimension: PyTorch asks of each symbolic size whether it
    is 1, and compiles a graph again where the answer changes. A number of blocks may be 1, the size of the whole not.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D].
        captures, scalars, numbers: in the plan's order.
        plan: the result of :meth:`Plan.encode`, with the sizes of the blocks.
    """
    decoded = Plan.decode(plan)
    assert decoded.sparsity.blocks is not None
    sizes = (*query.shape[:3], key.shape[2])
    return parts_of_map(Wanted(decoded.spec, sizes, captures, scalars, numbers, *decoded.sparsity.blocks, query.device))


def block_map_fake(query, key, captures, scalars, numbers, plan):
    """An empty tensor with the size of :func:`block_map`'s, for any symbolic sizes."""
    decoded = Plan.decode(plan)
    assert decoded.sparsity.blocks is not None
    sizes = (*query.shape[:3], key.shape[2])
    shape = Wanted(decoded.spec, sizes, captures, scalars, numbers, *decoded.sparsity.blocks, query.device).shape
    return query.new_empty(sum(sizes_of_parts(shape)), dtype=torch.int32)


OPS = {"block_map": Op.of_choices(SCHEMAS["block_map"], block_map, block_map_fake)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

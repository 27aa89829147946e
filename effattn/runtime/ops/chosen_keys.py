"""The op ``torch.ops.effattn.chosen_keys``: what a selector chooses, for a forward and backward that agree on it.

    chosen_keys(query, key, captures, scalars, numbers, plan) -> (units, cells)

``effattn::attend`` calls it where gradients are needed; its results are captured tensors of the plan that then runs
(:mod:`effattn.ir.chosen`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effattn.ir.chosen import CELL, shapes_of_choice
from effattn.ir.plan import Plan
from effattn.runtime.launching import narrow, on_device, too_narrow
from effattn.runtime.ops.attend import target_of
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.selection.run import select

SCHEMA = (
    "(Tensor query, Tensor key, Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan) -> (Tensor, Tensor)"
)

ENTRIES = 2**24  # entries of lists that are looked at together


def chosen_keys(
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    numbers: Sequence[float],
    plan: str,
) -> tuple[Tensor, Tensor]:
    """The keys that a selector chooses for each block of queries, in whole units.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D].
        captures, scalars, numbers: in the plan's order.
        plan: the result of :meth:`Plan.encode`, with a selector.

    Returns:
        units, bool, and cells, int8 (empty if the plan needs none), in the shapes of
        :func:`~effattn.ir.chosen.shapes_of_choice`. What lies beyond the last block or unit is 0.
    """
    decoded = Plan.decode(plan)
    selector = decoded.sparsity.select
    assert selector is not None
    shape, shape_of_cells = shapes_of_choice(selector, (*query.shape[:3], key.shape[2]), key.shape[1])
    units = torch.zeros(shape, dtype=torch.bool, device=query.device)
    cells = torch.zeros(shape_of_cells or (0,), dtype=torch.int8, device=query.device)
    if 0 in query.shape or 0 in key.shape:
        return units, cells
    if too_narrow(query):
        query, key = query.float(), key.float()
    with on_device(query.device):
        steps = target_of(decoded, query, key).steps
        listed = select(decoded, narrow(query), narrow(key), captures, scalars, numbers, steps)
    batch, heads, rows, width = shape
    step = max(ENTRIES // max(batch * heads * width, 1), 1)
    for first in range(0, rows - 1, step):
        some = slice(first, min(first + step, rows - 1))
        units[:, :, some, :-1] = listed.units(some, width - 1)
        if shape_of_cells:
            whole = F.pad(units[:, :, some], (0, shape_of_cells[3] * CELL - width))
            cells[:, :, some] = whole.unflatten(3, (-1, CELL)).sum(4, dtype=torch.int8)
    return units, cells


def chosen_keys_fake(query, key, captures, scalars, numbers, plan):
    """Empty tensors in the shapes of :func:`chosen_keys`, for any symbolic sizes."""
    selector = Plan.decode(plan).sparsity.select
    assert selector is not None
    units, cells = shapes_of_choice(selector, (*query.shape[:3], key.shape[2]), key.shape[1])
    return query.new_empty(units, dtype=torch.bool), query.new_empty(cells or (0,), dtype=torch.int8)


OPS = {"chosen_keys": Op.of_choices(SCHEMA, chosen_keys, chosen_keys_fake)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

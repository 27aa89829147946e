"""A plan over keys that a selector has chosen already, as captured tensors: what gradients need, and can be derived.

The choice itself has no gradient. Which keys are visited, forward and backward, is then told by a block map like that
of any other mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy

from effattn.ir import expr
from effattn.ir.attention import AttentionSpec, CaptureSpec
from effattn.ir.expr import FloorDiv, b, h, k, q
from effattn.ir.plan import Plan, Sparsity
from effattn.ir.selector import KEY_HEADS, Selector, TopP

UNITS = "chosen_units"  # bool: whether a unit of keys was chosen for a head and a block of queries
CELLS = "chosen_cells"  # int8: how many keys of a cell were; only where single keys are chosen
CELL = 32  # keys


def heads_of_choice(select: Selector, heads: int, kv_heads: int) -> int:
    """How many different choices there are for the query heads; each serves as many neighbours."""
    if select.expand.unit == 1:
        return 1
    if isinstance(select.pick.budget, TopP) or select.score.lists == 0:
        return heads
    return kv_heads if select.score.lists == KEY_HEADS else select.score.lists


def has_cells(select: Selector) -> bool:
    return select.expand.unit == 1


def shapes_of_choice(
    select: Selector, sizes: tuple[int, int, int, int], kv_heads: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``UNITS`` and ``CELLS`` in a call of sizes (B, Hq, Nq, Nk), which may be symbolic; () without cells.

    The last two dimensions are one longer than what is used: PyTorch asks of symbolic sizes whether they are 1, and
    compiles a graph again where the answer changes.
    """
    batch, heads, q_len, k_len = sizes
    block, unit = select.expand.block, select.expand.unit
    rows = (batch, heads_of_choice(select, heads, kv_heads), (q_len + block - 1) // block + 1)
    units, cells = ((k_len + width - 1) // width + 1 for width in (unit, CELL))
    return (*rows, units), (*rows, cells) if has_cells(select) else ()


def over_chosen(plan: Plan, heads: int, kv_heads: int) -> Plan:
    """The plan that attends to the chosen keys, with ``UNITS`` and perhaps ``CELLS`` as its last captures."""
    select = plan.sparsity.select
    assert select is not None
    block, unit = select.expand.block, select.expand.unit
    chosen = heads_of_choice(select, heads, kv_heads)
    head: Any = h if chosen == heads else FloorDiv(h, int(heads // chosen)) if chosen > 1 else sympy.Integer(0)

    def loaded(name: str, width: int) -> Any:
        keys = FloorDiv(k, width) if width > 1 else k
        return expr.load(name, (b, head, FloorDiv(q, block), keys), integer=True)

    keep: Any = sympy.Ne(loaded(UNITS, unit), 0)
    captures = (*plan.spec.captures, CaptureSpec(UNITS, "bool", 4))
    if has_cells(select):
        cell = loaded(CELLS, CELL)
        keep = sympy.And(cell > 0, sympy.Or(cell >= CELL, keep))
        captures = (*captures, CaptureSpec(CELLS, "int8", 4))
    spec: AttentionSpec = replace(plan.spec, keep=sympy.And(plan.spec.keep, keep), captures=captures)
    return replace(plan, spec=spec, sparsity=Sparsity())


def blocks_of_choice(spec: AttentionSpec) -> tuple[int, int] | None:
    """Queries and keys of a block of which all or none were chosen, or few; None where nothing was."""
    found = [load for load in expr.loads_of(spec.keep) if load.name in (UNITS, CELLS)]
    steps = [[int(index.args[1]) for index in load.indices[2:] if isinstance(index, FloorDiv)] for load in found]
    return next(((block, unit) for block, *units in steps for unit in units), None)

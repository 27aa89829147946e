"""What all sites with the same mask share: its block map, and the first key of each text. One node for each.

They only read the sizes of query and key, so the first site's stand for those of all others of the same sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import effattn.runtime.ops  # noqa: F401  (registers torch.ops.effattn)
from effattn.ir.plan import Plan, Sparsity
from effattn.lowering.iteration.block_rule import rule_alone
from effattn.lowering.kernels.spec import DECODE_QUERIES
from effattn.passes.graph.insertion import REGION, Inserter
from effattn.passes.graph.view import as_sympy
from effattn.runtime.ops.first_keys import plan_of
from effattn.runtime.targets.choice import chosen
from effattn.runtime.targets.target import PreparingTarget, Target


@dataclass
class Maps:
    """The block maps and first keys of one graph, each with the time of the site that it was made for."""

    made: dict[tuple, tuple[int, fx.Node]] = field(default_factory=dict)

    def of(self, writer: Inserter, plan: Plan, args: tuple[Any, ...], time: int) -> tuple[Plan, fx.Node | None]:
        """The plan with the sizes of its blocks, and the block map; the plan as it is if it visits none.

        ``args``: those of ``effattn::attend`` before the plan; ``time``: of the site.
        """
        query, key, value, captures, scalars, numbers = args
        blocks = _blocks(plan, *(node.meta["example_value"] for node in (query, key, value)))
        if blocks is None:
            return plan, None
        alone = rule_alone(plan.spec)
        text = Plan("mask", alone.spec, Sparsity(blocks=blocks)).encode()
        op, given = torch.ops.effattn.block_map.default, alone.given(captures, scalars, numbers)
        return replace(plan, sparsity=Sparsity(blocks=blocks)), self._shared(op, writer, query, key, given, text, time)

    def first_keys(self, writer: Inserter, plan: Plan, args: tuple[Any, ...], time: int) -> fx.Node | None:
        """What the plan reads as ``FIRST_KEY``; None if it reads none, or not at every length.

        The arguments are those of :meth:`of`.
        """
        query, key, _, captures, scalars, numbers = args
        if plan.complete is plan or plan.selects:
            return None
        text, alone = plan_of(plan)
        op, given = torch.ops.effattn.first_keys.default, alone.given(captures, scalars, numbers)
        return self._shared(op, writer, query, key, given, text, time)

    def _shared(
        self,
        op: Any,
        writer: Inserter,
        query: fx.Node,
        key: fx.Node,
        given: tuple[list, list, list],
        text: str,
        time: int,
    ) -> fx.Node:
        """The node of an op; an earlier one if it has the same arguments."""
        sizes = [size for node in (query, key) for size in node.meta["example_value"].shape[:3]]
        lengths = [each.meta["example_value"] if isinstance(each, fx.Node) else each for each in given[1]]
        # what a checkpoint computes stays within it
        place = (op, text, *given[0], *given[2], *map(as_sympy, (*sizes, *lengths)), writer.like.meta.get(REGION))
        when, node = self.made.get(place, (time + 1, None))
        if node is None or when > time or node._erased:
            node = writer.call(op, query, key, *given, text)
            self.made[place] = time, node
        return node


def _blocks(plan: Plan, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """The sizes of the blocks; None if a call needs no block map, or needs none at some length."""
    if plan.dispatch.min_length or plan.complete is not plan:
        return None
    if isinstance(query.shape[2], int) and query.shape[2] <= DECODE_QUERIES:
        return None  # decoding finds its keys itself
    widths = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
    if not all(isinstance(size, int) for size in widths):
        return None

    def why_not(target: Target):
        return target.why_not(plan.spec, query.dtype, *widths[2:])

    target, _ = chosen(plan.dispatch.target, query.device.type, why_not)
    if not isinstance(target, PreparingTarget):
        return None
    return target.map_blocks(plan, query.dtype, widths[0] // widths[1], *widths[2:], query.device)

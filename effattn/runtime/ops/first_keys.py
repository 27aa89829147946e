"""The op ``torch.ops.effattn.first_keys``: the first key of each text, once for all layers that share a mask.

    first_keys(query, key, captures, scalars, numbers, plan) -> Tensor

Of query and key only sizes and device are read. ``plan`` holds the mask alone (:func:`plan_of`), so that equal masks
have equal arguments. The result is the captured tensor ``FIRST_KEY`` of ``effattn::attend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import sympy
from torch import Tensor

from effattn.ir import expr
from effattn.ir.plan import Dispatch, Plan
from effattn.lowering.iteration.block_rule import RuleAlone, rule_alone
from effattn.runtime.ops.registry import Op, register
from effattn.runtime.targets.first_keys import empty_first_keys, with_first_keys

SCHEMAS = {
    "first_keys": (
        "(Tensor query, Tensor key, Tensor[] captures, SymInt[] scalars, Scalar[] numbers, str plan) -> Tensor"
    ),
}


def plan_of(plan: Plan) -> tuple[str, RuleAlone]:
    """The encoded plan of the op for a plan that reads ``FIRST_KEY``, and which of the captures and so on it takes."""
    (load,) = {load for load in expr.loads_of(plan.spec.keep) if load.name == expr.FIRST_KEY}
    alone = rule_alone(plan.spec.given.dense())
    spec = replace(alone.spec, keep=sympy.Ge(load, 0))
    below = plan.dispatch.below
    shortest = plan.dispatch.min_length if below is None or below.complete is below else 0
    return Plan("mask", spec, dispatch=Dispatch(min_length=shortest)).encode(), alone


def first_keys(
    query: Tensor, key: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], numbers: Sequence[float], plan: str
) -> Tensor:
    """The first key of the text of each batch, or of each query's, where the mask says so: int32 [B] or [B, Nq].

    With fewer keys than the plan's ``min_length`` nobody reads them, and they are 0.

    Args:
        query: [B, Hq, Nq, D]; key: [B, Hkv, Nk, D].
        captures, scalars, numbers: in the plan's order.
        plan: of :func:`plan_of`.
    """
    decoded = Plan.decode(plan)
    complete = decoded.complete
    if key.shape[2] < decoded.dispatch.min_length:
        return empty_first_keys(complete, query).zero_()
    return with_first_keys(complete, query, key, captures, scalars, numbers)[-1]


def first_keys_fake(query, key, captures, scalars, numbers, plan):
    return empty_first_keys(Plan.decode(plan).complete, query)


OPS = {"first_keys": Op.of_choices(SCHEMAS["first_keys"], first_keys, first_keys_fake)}
_LIBRARY = register(OPS) or globals().get("_LIBRARY")

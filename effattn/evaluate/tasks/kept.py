"""The keys that each query of a captured attention keeps under a plan. Only here static and dynamic forms differ.

Everything that needs kept keys (recovered mass, density, the oracle's budget) calls :func:`kept_rows`. Forms whose kept
keys are an expression use :func:`rule_rows`. Forms with a selector run it once, before the first mask, and convert each
chunk of the block list to a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from effattn.compiler.capture import Captured
from effattn.ir.plan import Plan
from effattn.runtime.algebra import Span, bindings, evaluate
from effattn.runtime.ops.attend import target_of
from effattn.runtime.selection.run import select
from effattn.runtime.targets.chunks import Walker
from effattn.runtime.targets.first_keys import with_first_keys

Rows = tuple[int, int]  # start, stop


class KeptRows(Protocol):
    """For a captured attention and a plan, one mask per chunk of queries."""

    def __call__(self, captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
        """Yield bool [B or 1, Hq or 1, stop - start, Nk] for each ``(start, stop)`` of ``chunks``, in order.

        True where the query keeps the key, even if the mask forbids it: combine with :func:`allowed_rows`. Must not
        hold Nq x Nk values. ``Dispatch.min_length`` is applied by :func:`kept_rows`.
        """
        ...


@dataclass(frozen=True)
class Source:
    """A source of masks, and the plans it accepts."""

    takes: Callable[[Plan], bool]
    rows: KeptRows


def kept_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """The masks of the first source that accepts the plan; see :class:`KeptRows`."""
    plan = plan.at(captured.key.shape[2])
    return _source(plan).rows(captured, plan, chunks)


def is_static(plan: Plan) -> bool:
    """Whether the plan's kept keys are an expression, so that they can be counted without data."""
    return _source(plan).rows is rule_rows


def allowed_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """The keys that the mask allows, whatever the form keeps."""
    return rule_rows(captured, Plan(plan.form, plan.spec.dense()), chunks)


def rule_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """Masks of a plan whose kept keys are an expression: ``plan.spec.rule``, evaluated per chunk."""
    keys = captured.shape[3]
    tensors = (captured.query, captured.key)
    given = with_first_keys(plan, *tensors, captured.captures, captured.scalars, captured.numbers)
    symbols, captures = bindings(plan.spec, given, captured.scalars, captured.numbers)
    device = captured.query.device
    for start, stop in chunks:
        values = symbols | indices(captured, (start, stop), keys)
        kept = evaluate(plan.spec.rule, values, captures, torch.float64, device)
        mask = torch.as_tensor(kept, device=device).to(torch.bool)
        mask = mask.view([1] * (4 - mask.ndim) + list(mask.shape))
        yield mask.expand(mask.shape[0], mask.shape[1], stop - start, keys)


def indices(captured: Captured, rows: Rows, keys: int) -> dict[str, Any]:
    """Values of the index symbols and lengths; they broadcast against [B, Hq, rows, keys]."""
    batch, heads, q_len, k_len = captured.shape
    device = captured.query.device
    spans = {
        "b": Span.of([(0, batch)], device, -1, 1, 1, 1),
        "h": Span.of([(0, heads)], device, -1, 1, 1),
        "q": Span.of([rows], device, -1, 1),
        "k": Span.of([(0, keys)], device),
    }
    return {**spans, "Nq": q_len, "Nk": k_len}


def reach(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> list[int]:
    """For each chunk, the number of leading keys that contain all allowed ones; halves the work if causal."""
    symbols, captures = bindings(plan.spec, captured.captures, captured.scalars, captured.numbers)
    walker = Walker(plan.spec.predicate, captured.shape, symbols, captures)
    runs = [walker.runs(start, stop) for start, stop in chunks]
    return [max((run.stop for run in found), default=0) for found in runs]


def _source(plan: Plan) -> Source:
    return next(source for source in SOURCES if source.takes(plan))


def listed_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """Masks of a plan with a selector: it runs once, and its block list is converted to a mask per chunk."""
    given = (captured.captures, captured.scalars, captured.numbers)
    target = target_of(plan, captured.query, captured.value)
    listed = select(plan, captured.query, captured.key, *given, target.steps)
    for start, stop in chunks:
        yield listed.rows(start, stop, captured.shape[1], captured.shape[3])


SOURCES: tuple[Source, ...] = (
    Source(lambda plan: plan.sparsity.select is not None, listed_rows),
    Source(lambda plan: True, rule_rows),
)

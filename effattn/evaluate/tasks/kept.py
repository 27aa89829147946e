"""Which keys every row of a captured attention keeps under a plan: THE place that knows static from dynamic forms.

Everything here that asks for kept keys (recovered mass, density, the oracle's budget) goes through :func:`kept_rows`.
A form whose kept keys are an expression is served by :func:`rule_rows`. One that chooses at run time runs its selection
once, before the first mask, and then writes each chunk of its block list out as a mask.
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
from effattn.runtime.selection.run import select
from effattn.runtime.targets.chunks import Walker
from effattn.runtime.targets.first_keys import with_first_keys

Rows = tuple[int, int]  # start, stop


class KeptRows(Protocol):
    """The protocol: for a captured attention and a plan, one mask a chunk of rows."""

    def __call__(self, captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
        """Yield, for each ``(start, stop)`` of ``chunks`` in order, bool [B or 1, Hq or 1, stop - start, Nk].

        True where the row keeps the key. Keys that the user's mask forbids may be True too: whoever asks combines
        with :func:`allowed_rows`. Nothing of Nq x Nk values may be held. Rules by length (``Dispatch.min_length``) are
        applied by :func:`kept_rows` and need not be looked at.
        """
        ...


@dataclass(frozen=True)
class Source:
    """Who answers for which plans."""

    takes: Callable[[Plan], bool]
    rows: KeptRows


def kept_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """The masks of the first source that takes the plan; see :class:`KeptRows`."""
    plan = plan.at(captured.key.shape[2])
    return _source(plan).rows(captured, plan, chunks)


def is_static(plan: Plan) -> bool:
    """Whether an expression says which keys the plan keeps, so that they can be counted without data."""
    return _source(plan).rows is rule_rows


def allowed_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """What the user's mask allows, whatever the form keeps of it."""
    return rule_rows(captured, Plan(plan.form, plan.spec.dense()), chunks)


def rule_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """Masks of a plan whose kept keys are an expression: ``plan.spec.rule``, evaluated chunk by chunk."""
    keys = captured.shape[3]
    given = with_first_keys(plan, captured.key, captured.captures, captured.scalars, captured.numbers)
    symbols, captures = bindings(plan.spec, given, captured.scalars, captured.numbers)
    device = captured.query.device
    for start, stop in chunks:
        values = symbols | indices(captured, (start, stop), keys)
        kept = evaluate(plan.spec.rule, values, captures, torch.float64, device)
        mask = torch.as_tensor(kept, device=device).to(torch.bool)
        mask = mask.view([1] * (4 - mask.ndim) + list(mask.shape))
        yield mask.expand(mask.shape[0], mask.shape[1], stop - start, keys)


def indices(captured: Captured, rows: Rows, keys: int) -> dict[str, Any]:
    """Values of the index symbols and lengths, to broadcast against [B, Hq, rows, keys]."""
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
    """For each chunk, the number of leading keys beyond which the user's mask allows none: saves half if causal."""
    symbols, captures = bindings(plan.spec, captured.captures, captured.scalars, captured.numbers)
    walker = Walker(plan.spec.predicate, captured.shape, symbols, captures)
    runs = [walker.runs(start, stop) for start, stop in chunks]
    return [max((run.stop for run in found), default=0) for found in runs]


def _source(plan: Plan) -> Source:
    return next(source for source in SOURCES if source.takes(plan))


def listed_rows(captured: Captured, plan: Plan, chunks: Sequence[Rows]) -> Iterator[Tensor]:
    """Masks of a plan that chooses at run time: its selection runs once, its block lists are written out by chunks."""
    given = (captured.captures, captured.scalars, captured.numbers)
    target = "triton" if captured.query.device.type == "cuda" and plan.dispatch.target != "portable" else "portable"
    listed = select(plan, captured.query, captured.key, *given, target=target)
    for start, stop in chunks:
        yield listed.rows(start, stop, captured.shape[1], captured.shape[3])


SOURCES: tuple[Source, ...] = (
    Source(lambda plan: plan.sparsity.select is not None, listed_rows),
    Source(lambda plan: True, rule_rows),
)

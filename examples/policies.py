"""What approximate policies cost on long text, in perplexity and time; used by demo.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from screen import Screen, table

from effattn.evaluate import density_of, perplexity, timed
from effattn.policy import Policy


@dataclass(frozen=True)
class Row:
    """What one policy costs."""

    name: str
    perplexity: float
    density: float
    seconds: float
    compilation: float  # seconds up to the first answer, less a run


def of_any_length(ids: Any) -> Any:
    """``ids``, marked so that what is compiled for them serves every length.

    ``dynamic=True`` instead compiles three times. It makes the floats of the modules symbolic too, on which Inductor
    gives up half-way to begin again. And where ``ids`` are a slice it guards the sizes of the whole tensor, so that ids
    that are no slice need a graph of their own; ``contiguous`` copies no slice of a batch of one.
    """
    torch._dynamo.mark_dynamic(ids, 1)
    return ids


def short_power() -> dict[str, Any]:
    """The form power with a window for texts of 2,048 tokens: the policy that ships begins at 4,096."""
    params = {"block": 64, "window": 512, "sinks": 64}
    return {"schema": 1, "name": "power, window 512", "rule": [{"forms": ["power"], "params": {"power": params}}]}


def policies(model: Any, text: Any, rest: str, screen: Screen) -> Iterator[Row]:
    """The uncompiled model, then each policy: a row as soon as it is measured."""
    torch._dynamo.reset()
    length = text.shape[1]
    again = 1 if text.is_cuda else 0  # kernels are generated when they are first needed: that call is no measure
    with screen.step("dense, uncompiled"):
        dense = timed(lambda: perplexity(model, text), again)
    yield Row("uncompiled", dense.value.value, 1.0, dense.value.seconds, 0.0)
    for policy in [Policy.of(given) for given in (("exact", "window", "power") if text.is_cuda else (short_power(),))]:
        body = torch.compile(model.base_model, backend="effattn", options={"policy": policy, "rest": rest})
        few = of_any_length(text[:, :64])
        with screen.step(f"policy {policy.name}: compile"), torch.no_grad():
            compiled = timed(lambda body=body, few=few: body(few, use_cache=False), 0)
        with screen.step(f"policy {policy.name}: {length:,} tokens"):
            measured = timed(lambda body=body: perplexity(model, text, body), again)
        kept = 1.0
        for rule in policy.rules[:1]:
            form = rule.preference[0]
            kept = density_of(form, length, rule.params_of(form).model_dump(), rule.min_length)
        compilation = compiled.first + measured.first - measured.median
        yield Row(policy.name, measured.value.value, kept, measured.value.seconds, compilation)


def as_table(rows: list[Row]) -> Table:
    made = table("policy", "perplexity", "against dense", "density", "seconds", "to compile")
    dense = rows[0].perplexity
    for row in rows:
        change = f"{100 * (row.perplexity / dense - 1):+.2f} %"
        figures = (
            f"{row.perplexity:.3f}",
            change,
            f"{row.density:.3f}",
            f"{row.seconds:.2f}",
            f"{row.compilation:.1f}" if row.compilation else "",
        )
        made.add_row(row.name, *figures)
    return made

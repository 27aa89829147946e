"""What runs a replaced attention: the file of its kernel on this machine's GPU, or a few words."""

from __future__ import annotations

from collections.abc import Callable

import torch

from effattn.ir.text import text
from effattn.lowering.iteration.block_rule import undecided
from effattn.lowering.iteration.tile_ranges import by_formula
from effattn.passes.choose.record import Choice
from effattn.passes.choose.routes import Route
from effattn.runtime.targets.choice import chosen

SDPA = "torch.nn.functional.scaled_dot_product_attention"


def described(choice: Choice) -> str | None:
    """The op or kernel file that runs a choice, written now if it is missing. None: the user's code runs."""
    return _RUN[choice.route](choice)


def how_tiles_are_found(choice: Choice) -> str:
    """How an op finds the keys that it visits: by formula, by a block map, or by a selector."""
    if choice.route != "op" or choice.plan is None:
        return ""
    if choice.plan.selects:
        return "by selector"
    rule = choice.plan.spec.rule
    if by_formula(rule):
        return "by formula"
    left = undecided(rule)
    tested = f"; it cannot decide {' & '.join(map(text, left))}, which is tested: right, and slower" if left else ""
    return f"by block map{tested}"


def _as_written(choice: Choice) -> str | None:
    return None if choice.match.nodes.sdpa is None else SDPA


def _attend(choice: Choice) -> str:
    site, plan = choice.match.site, choice.plan
    assert plan is not None
    asked = plan.complete.spec, getattr(torch, site.dtype), int(site.layout.head_dim), int(site.layout.value_dim)
    target, refusal = chosen(plan.dispatch.target, site.device, lambda one: one.why_not(*asked))
    return target.describe(plan, site) + ("" if refusal is None else f": {refusal.reason}")


def _features(choice: Choice) -> str:
    op = "window_linear" if getattr(choice.params, "window", 0) else "linear"
    return f"effattn::{op}, after the feature maps"


def _linear(choice: Choice) -> str:
    site, spec = choice.match.site, choice.match.site.linear
    assert spec is not None
    asked = getattr(torch, site.dtype), int(site.layout.head_dim), int(site.layout.value_dim)
    target, refusal = chosen(choice.target, site.device, lambda target: target.linear.why_not(*asked))
    found = target.linear.describe(site, spec.causal, spec.rate is not None, spec.normalised)
    return found + ("" if refusal is None else f": {refusal.reason}")


_RUN: dict[Route, Callable[[Choice], str | None]] = {
    "keep": _as_written,
    "sdpa": lambda choice: SDPA,
    "op": _attend,
    "features": _features,
    "linear": _linear,
}

"""What runs an attention that is replaced: the file of its kernel on this machine's GPU, or a few words."""

from __future__ import annotations

import torch

from effattn.passes.choose.choice import Choice
from effattn.passes.match.anchors.linear import LinearMatch
from effattn.runtime.targets.choice import chosen


def described(choice: Choice) -> str:
    """What runs the plan of a choice; a file is written now if it was not there."""
    site, plan = choice.match.site, choice.plan
    assert plan is not None
    asked = plan.complete.spec, getattr(torch, site.dtype), int(site.layout.head_dim), int(site.layout.value_dim)
    target, refusal = chosen(plan.dispatch.target, site.device, lambda one: one.why_not(*asked))
    return target.describe(plan, site) + ("" if refusal is None else f": {refusal.reason}")


def linear_described(one: LinearMatch) -> str:
    """The same for linear attention."""
    site = one.match.site
    asked = getattr(torch, site.dtype), int(site.layout.head_dim), int(site.layout.value_dim)
    target, refusal = chosen(None, site.device, lambda target: target.linear.why_not(*asked))
    found = target.linear.describe(site, one.term.causal, one.term.rate is not None, one.normalised)
    return found + ("" if refusal is None else f": {refusal.reason}")

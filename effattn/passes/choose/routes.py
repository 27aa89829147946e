"""How a form is computed at a site (SDPA's own kernels, an op with its plan, or the user's code), and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from effattn.ir import expr
from effattn.ir.plan import Dispatch, Kernel, Plan, Sparsity
from effattn.ir.site import Op, Site
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.exact import kernel_of
from effattn.lowering.forms.form import Params
from effattn.lowering.schedules.exact import Kind
from effattn.passes.candidate.record import MatchedNodes
from effattn.runtime.targets import sdpa
from effattn.runtime.targets.choice import ANYWHERE, asked_for, why_generated

Route = Literal["keep", "sdpa", "op", "features", "linear"]


@dataclass(frozen=True)
class Routed:
    """The route of exact attention at a site, and its reason."""

    route: Route
    reason: str


def linear_route(_site: Site, _nodes: MatchedNodes, _kernel: Kernel, _target: str | None) -> Routed:
    """The route of attention without a softmax, and its reason."""
    return Routed("linear", "the graph spells linear attention: the same function, in chunks with a state between them")


def exact_route(site: Site, nodes: MatchedNodes, kernel: Kernel = "auto", target: str | None = None) -> Routed:
    """The route of exact attention at a site, and its reason.

    Args:
        kernel: what computes attention that SDPA's kernels compute too.
        target: the one that was asked for.
    """
    if (why := _generated_instead(site, kernel, target)) is not None:
        return Routed("op", why + _grouped(site))
    if nodes.is_plain_sdpa and not nodes.key.folded and not needs_all_heads(site) and _drops(site):
        return Routed("keep", "already an SDPA call without a mask: its own fast kernels run")
    if _one_small_row(site):
        reason = "one query over few keys, too wide for a kernel: its weights are smaller than the query itself"
        return Routed("keep", reason)
    if nodes.lse is None and not site.sink and sdpa_takes(site):
        causal = "the mask is causal" if site.spec.predicate != sympy.true else "there is no mask"
        heads = ", which take grouped heads expanded in float32" if needs_all_heads(site) else _grouped(site)
        return Routed("sdpa", f"{causal}: SDPA's own fast kernels, no mask tensor" + heads)
    if nodes.sdpa is not None and is_opaque(site) and _drops(site):
        return Routed("keep", "the mask is a tensor with a value for every pair: SDPA reads it as it is")
    return Routed("op", "a kernel specialised on predicate and score, no mask tensor" + _grouped(site))


def _generated_instead(site: Site, kernel: Kernel, target: str | None) -> str | None:
    """Why a generated kernel computes a site that SDPA's kernels compute too; None if it does not."""
    if kernel == "sdpa" or not sdpa_takes(site):
        return None
    kind: Kind = "all" if site.spec.predicate == sympy.true else "causal"
    shape = getattr(torch, site.dtype), int(site.layout.head_dim), site.hints.q_len
    given = kernel, asked_for(target, site.device), torch.device(site.device), site.spec.complete, kind, *shape
    return why_generated(*given, training=site.stage == "train")


def needs_all_heads(site: Site) -> bool:
    """Whether SDPA avoids N x N scores only if key and value have as many heads as query."""
    return sdpa.needs_all_heads(site.device, site.dtype, site.layout.groups)


def _grouped(site: Site) -> str:
    return ", grouped heads not expanded" if site.layout.groups > 1 else ""


def _one_small_row(site: Site) -> bool:
    """Whether there is nothing to save, as in attention over a model's layers, whose heads are tokens."""
    sizes = site.layout
    keys = sizes.fixed_keys
    few = sizes.q_len == 1 and keys is not None and keys <= int(sizes.head_dim)
    return few and (int(sizes.head_dim) > sdpa.MAX_HEAD_DIM or int(sizes.heads) > sdpa.MAX_HEADS)


def sdpa_takes(site: Site) -> bool:
    """Whether SDPA without a mask tensor computes the site: no mask or causal, plain scale, equal head dimensions."""
    plain = site.spec.predicate == sympy.true or (
        site.spec.predicate == sympy.Le(expr.k, expr.q) and sympy.expand(site.layout.q_len - site.layout.k_len) == 0
    )
    widths = site.layout.head_dim == site.layout.value_dim and site.layout.head_dim <= sdpa.MAX_HEAD_DIM
    sizes = widths and site.layout.heads <= sdpa.MAX_HEADS
    return plain and sizes and _drops(site) and expr.plain_scale(site.spec.score) is not None


def _drops(site: Site) -> bool:
    """Whether SDPA avoids N x N scores with the dropout of a site."""
    return not site.spec.dropout or sdpa.drops(site.device)


def is_opaque(site: Site) -> bool:
    """Whether mask or bias is a tensor with a value for every (q, k), so that reading it saves nothing."""
    pairs = (
        load for load in expr.loads_of(site.spec.predicate, site.spec.score) if load.has(expr.q) and load.has(expr.k)
    )
    return any(all(not (index.has(expr.q) and index.has(expr.k)) for index in load.indices) for load in pairs)


# the route of the user's own function, by the kind of site
EXACT: dict[Op, Callable[[Site, MatchedNodes, Kernel, str | None], Routed]] = {
    Op.SOFTMAX: exact_route,
    Op.LINEAR: linear_route,
}


def plan_of(site: Site, form: str, params: Params, min_length: int, target: str | None) -> Plan:
    """The plan for a site and form; on the portable target if the requested target does not support it."""
    spec = replace(site.spec, keep=FORMS[form].keep(params, site)).seeded
    sparsity = Sparsity(FORMS[form].selector(params, site))
    widths = int(site.layout.head_dim), int(site.layout.value_dim)
    dtype = getattr(torch, site.dtype)
    asked = asked_for(target, site.device)  # a target that cannot run here at all is reported elsewhere
    if asked.why_not_on(site.device) is None and asked.why_not(spec.complete, dtype, *widths) is not None:
        target = ANYWHERE
    dispatch = Dispatch(min_length, None, target, site.output_layout, lse_is_read=False, kernel=kernel_of(params))
    return Plan(form, spec, sparsity, dispatch)

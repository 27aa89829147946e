"""One form per site, with the reason: what the policy allows, what the form's rules admit, what is cheapest to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import sympy
import torch

from effattn.errors import FormRefused, TargetError
from effattn.ir import expr
from effattn.ir.plan import Dispatch, Plan, Sparsity
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Op, Site
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.form import Params, Rule
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.record import Match, MatchedNodes
from effattn.passes.choose.cheapest import cheapest
from effattn.passes.choose.trained import no_weights
from effattn.passes.compilation import Compilation, Pass
from effattn.policy import Policy
from effattn.policy import Rule as PolicyRule
from effattn.runtime.targets import sdpa
from effattn.runtime.targets.choice import ANYWHERE, asked_for, why_not_there

Route = Literal["keep", "sdpa", "op", "features", "linear"]


@dataclass(frozen=True)
class Considered:
    """One form that was considered for a site."""

    form: str
    accepted: bool
    refusals: tuple[Refusal, ...] = ()

    @property
    def reasons(self) -> tuple[str, ...]:
        return tuple(map(str, self.refusals))

    @property
    def rules(self) -> tuple[Why, ...]:
        return tuple(refusal.rule for refusal in self.refusals)


@dataclass(frozen=True)
class Choice:
    """What will be done with a site.

    ``route``: "keep" leaves the node as it is, "sdpa" writes an SDPA call without a mask, "op" writes
    ``effattn::attend`` with ``plan``, "features" writes feature maps and ``effattn::linear``. At a site without a
    softmax "linear" writes that op, and the form is "exact": the user's own function.
    """

    match: Match
    form: str
    params: Params
    route: Route
    reason: str
    plan: Plan | None
    considered: tuple[Considered, ...]
    target: str | None = None  # of an op without a plan

    @property
    def exact(self) -> bool:
        return FORMS[self.form].kind == "exact"


class ChooseForms(Pass):
    """Every match gets a form and a route."""

    name = "choose forms"
    fills = "choices"
    needs = ("matches",)

    def apply(self, work: Compilation) -> bool:
        outcome = work.outcome
        if work.strict:
            work.policy.check_sites(match.site for match in outcome.matches)
        for match in outcome.matches:
            with left_alone(match.nodes.replaced, outcome.missed, work.strict):
                choice = choose(match, work.policy, strict=work.strict, target=work.target)
                if choice.route not in ("keep", "sdpa"):
                    check_target(match.site, work.target if choice.plan is None else choice.plan.dispatch.target)
                outcome.choices.append(choice)
        return False


def check_target(site: Site, target: str | None) -> None:
    """Refuse a target that the user asked for at a site, if it cannot run there.

    Raises:
        TargetError: says which site, why, and what to do.
    """
    if (refusal := why_not_there(target, site.device)) is not None:
        raise TargetError(f"target={target!r} for {site.name} ({site.location}): {refusal}")


def choose(match: Match, policy: Policy, *, strict: bool, target: str | None) -> Choice:
    """What is done with one match.

    Raises:
        FormRefused: with ``strict``, a form that the policy names does not apply at a site that its rule matches.
    """
    site = match.site
    found = policy.match(site)
    rule = found.rule
    if rule is not None and rule.automatic and site.op is Op.SOFTMAX:
        return _cheapest(match, policy, rule, strict, target)
    considered: list[Considered] = []
    for name in rule.preference if rule is not None else ("exact",):
        form = FORMS[name]
        params = rule.params_of(name) if rule is not None else form.params()
        min_length = rule.min_length if rule is not None else 0
        considered.append(_considered(site, name, params, strict, min_length))
        if not considered[-1].accepted:
            continue
        if name == "exact":
            break
        if not form.softmax:
            reason = f"policy {policy.name!r} asks for it, {_accepted_by(params)}"
            return Choice(match, name, params, "features", reason, None, tuple(considered), target)
        plan = plan_of(site, name, params, min_length, target)
        since = f" from {min_length:,} keys on" if min_length else ""
        reason = f"policy {policy.name!r} asks for it{since}"
        return Choice(match, name, params, "op", reason, plan, tuple(considered))
    return _exact(match, tuple(considered), "; ".join([*_refused(considered), *found.notes]), target)


def _considered(site: Site, name: str, params: Params, strict: bool, min_length: int = 0) -> Considered:
    """Whether a form applies at a site.

    Raises:
        FormRefused: it does not, and with ``strict`` that is an error.
    """
    keys = site.layout.fixed_keys
    if not FORMS[name].softmax and keys is not None and keys < min_length:  # its op cannot look at lengths
        reason = f"this graph is of {keys:,} keys, and min_length is {min_length:,}"
        return Considered(name, False, (Refusal(Why.SHORT, reason),))
    if site.op is Op.SOFTMAX:
        refusals = FORMS[name].refusals(site, params) + (() if name == "exact" else _cannot_lower(site, name))
    else:
        refusals = () if name == "exact" else (NO_SOFTMAX,)
    if not FORMS[name].softmax and not refusals:
        refusals = no_weights(site, params, min_length)
    if refusals and strict and name != "exact":
        raise FormRefused.because(f"{site.name} ({site.location}): {name} refused: ", *refusals)
    return Considered(name, not refusals, refusals)


def _refused(considered: list[Considered]) -> list[str]:
    refused = [one for one in considered if not one.accepted and one.form != "exact"]
    return [f"{one.form} refused: {', '.join(one.reasons)}" for one in refused]


def _cheapest(match: Match, policy: Policy, rule: PolicyRule, strict: bool, target: str | None) -> Choice:
    """The cheapest form at every length, as one plan that decides when the op runs."""
    site = match.site
    length = max(rule.min_length, 1)  # which form it is, is decided when the op runs
    considered = [_considered(site, name, rule.params_of(name), strict, length) for name in rule.preference]
    accepted = [one.form for one in considered if one.accepted]
    dense = exact_route(site, match.nodes)[0] != "op"
    also: list[str] = []  # why no form with an op of its own was chosen
    if not all(FORMS[name].softmax for name in accepted):
        choice = _own_op(match, policy, rule, accepted, dense, considered, target)
        if isinstance(choice, Choice):
            return choice
        also.append(choice)
        accepted = [name for name in accepted if FORMS[name].softmax]
    found = cheapest(site, {name: rule.params_of(name) for name in accepted}, dense)
    steps = found.steps_from(rule.min_length)
    if all(name == "exact" for _, name in steps):
        why = [
            f"of {', '.join(accepted)} exact is the cheapest at every length ({found.device})",
            *also,
            *_refused(considered),
        ]
        return _exact(match, tuple(considered), "; ".join(why), target)
    plan: Plan | None = None
    for first, name in steps:
        params = rule.params_of(name)
        more = plan_of(site, name, params, first if plan is not None else 0, target)
        plan = more.dispatched(below=plan)
    form = steps[-1][1]
    reason = f"policy {policy.name!r} asks for the cheapest: {found.text(steps)}"
    reason = "; ".join([reason, *also, *_refused(considered)])
    return Choice(match, form, rule.params_of(form), "op", reason, plan, tuple(considered))


def _own_op(
    match: Match,
    policy: Policy,
    rule: PolicyRule,
    accepted: list[str],
    dense: bool,
    considered: list[Considered],
    target: str | None,
) -> Choice | str:
    """The choice of a form with an op of its own, where it is the cheapest at this graph's one length; or why not."""
    site, keys = match.site, match.site.layout.fixed_keys
    assert keys is not None
    found = cheapest(site, {name: rule.params_of(name) for name in accepted}, dense)
    costs = ", ".join(f"{name} {found.milliseconds(name):.3g} ms" for name in found.costs)
    predicted = f"at the {keys:,} keys of this graph (predicted: {costs}; {found.device})"
    best = found.at(keys)
    if FORMS[best].softmax:
        return f"{', '.join(name for name in accepted if not FORMS[name].softmax)} is not the cheapest {predicted}"
    params = rule.params_of(best)
    reason = f"policy {policy.name!r} asks for the cheapest: {best} {predicted}, {_accepted_by(params)}"
    reason = "; ".join([reason, *_refused(considered)])
    return Choice(match, best, params, "features", reason, None, tuple(considered), target)


def _accepted_by(params: Any) -> str:
    return f"with the weights in {params.weights}" if params.weights else f"accepting an error of {params.tolerance:g}"


def _exact(match: Match, considered: tuple[Considered, ...], why: str, target: str | None) -> Choice:
    site = match.site
    params = FORMS["exact"].params()
    route, reason = EXACT[site.op](site, match.nodes)
    plan = plan_of(site, "exact", params, 0, target) if route == "op" else None
    return Choice(match, "exact", params, route, f"{reason}; {why}" if why else reason, plan, considered, target)


def linear_route(_site: Site, _nodes: MatchedNodes) -> tuple[Route, str]:
    """How attention without a softmax is computed."""
    return "linear", "the graph spells linear attention: the same function, in chunks with a state between them"


def exact_route(site: Site, nodes: MatchedNodes) -> tuple[Route, str]:
    """How exact attention is computed at a site, and why."""
    if nodes.is_plain_sdpa and not nodes.key.folded and not needs_all_heads(site):
        return "keep", "already an SDPA call without a mask: its own fast kernels run"
    if _one_small_row(site):
        return "keep", "one query over few keys, too wide for a kernel: its weights are smaller than the query itself"
    if nodes.lse is None and not site.sink and sdpa_takes(site):
        causal = "the mask is causal" if site.spec.predicate != sympy.true else "there is no mask"
        heads = ", which take grouped heads expanded in float32" if needs_all_heads(site) else _grouped(site)
        return "sdpa", f"{causal}: SDPA's own fast kernels, no mask tensor" + heads
    if (refusals := _cannot_lower(site, "exact")) != ():
        return "keep", f"left as it was: {'; '.join(map(str, refusals))}"
    if nodes.sdpa is not None and is_opaque(site):
        return "keep", "the mask is a tensor with a value for every pair: SDPA reads it as it is"
    return "op", "a kernel specialised on predicate and score, no mask tensor" + _grouped(site)


def needs_all_heads(site: Site) -> bool:
    """Whether SDPA avoids N x N scores only if key and value have as many heads as query."""
    return sdpa.needs_all_heads(site.device, site.dtype, site.layout.groups)


def _grouped(site: Site) -> str:
    return ", grouped heads not expanded" if site.layout.groups > 1 else ""


def _one_small_row(site: Site) -> bool:
    """Whether nothing is to be saved, as in attention over the layers of a model, whose heads are tokens."""
    sizes = site.layout
    keys = sizes.fixed_keys
    few = sizes.q_len == 1 and keys is not None and keys <= int(sizes.head_dim)
    return few and (int(sizes.head_dim) > sdpa.MAX_HEAD_DIM or int(sizes.heads) > sdpa.MAX_HEADS)


def sdpa_takes(site: Site) -> bool:
    """Whether SDPA without a mask tensor computes the site: no mask or top-left causal, a plain scale, equal widths."""
    plain = site.spec.predicate == sympy.true or (
        site.spec.predicate == sympy.Le(expr.k, expr.q) and sympy.expand(site.layout.q_len - site.layout.k_len) == 0
    )
    widths = site.layout.head_dim == site.layout.value_dim and site.layout.head_dim <= sdpa.MAX_HEAD_DIM
    return plain and widths and site.layout.heads <= sdpa.MAX_HEADS and expr.plain_scale(site.spec.score) is not None


def is_opaque(site: Site) -> bool:
    """Whether mask or bias is a tensor that holds a value for every (q, k): there is nothing to save by reading it."""
    pairs = (
        load for load in expr.loads_of(site.spec.predicate, site.spec.score) if load.has(expr.q) and load.has(expr.k)
    )
    return any(all(not (index.has(expr.q) and index.has(expr.k)) for index in load.indices) for load in pairs)


# how the user's own function is computed, by its kind
EXACT: dict[Op, Callable[[Site, MatchedNodes], tuple[Route, str]]] = {Op.SOFTMAX: exact_route, Op.LINEAR: linear_route}
NO_SOFTMAX = Refusal(
    Why.NO_SOFTMAX,
    "the graph spells linear attention, and a form stands for a softmax",
    "let the rule name other layers",
)
OP_RULES = (
    Rule(
        Why.GRADIENT_OF_BIAS,
        lambda site, params: not site.captures_need_grad,
        "a tensor that the score reads needs a gradient itself (a learned bias or scale), "
        "which the op does not compute",
        "run under torch.no_grad()",
    ),
    Rule(
        Why.GRADIENT_OF_EMPTY_ROWS,
        lambda site, params: not (site.needs_grad and site.spec.empty_rows in ("mean", "nan")),
        "gradients are needed, and rows that may attend to nothing have some that depend on rounding",
        "use SDPA, where such rows are zero, or run under torch.no_grad()",
    ),
)


def _cannot_lower(site: Site, form: str) -> tuple[Refusal, ...]:
    """Reasons that lie in the op and not in the form. Exact sites that SDPA takes do not come here."""
    refusals = (rule.refusal(site, FORMS[form].params()) for rule in OP_RULES)
    return tuple(refusal for refusal in refusals if refusal is not None)


def plan_of(site: Site, form: str, params: Params, min_length: int, target: str | None) -> Plan:
    """The plan that an op needs for this site and form; on the portable target where kernels cannot serve it."""
    spec = replace(site.spec, keep=FORMS[form].keep(params, site))
    sparsity = Sparsity(FORMS[form].selector(params, site))
    widths = int(site.layout.head_dim), int(site.layout.value_dim)
    dtype = getattr(torch, site.dtype)
    asked = asked_for(target, site.device)  # where it cannot run at all, the user or the log is told
    if asked.why_not_on(site.device) is None and asked.why_not(spec.complete, dtype, *widths) is not None:
        target = ANYWHERE
    return Plan(form, spec, sparsity, Dispatch(min_length, None, target, site.output_layout, lse_is_read=False))

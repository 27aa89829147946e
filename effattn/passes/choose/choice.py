"""One form per site, with the reason: allowed by the policy, accepted by the form's rules, and cheapest to run."""

from __future__ import annotations

from typing import Any

from effattn.errors import FormRefused, TargetError
from effattn.ir.expr import FIRST_KEY
from effattn.ir.plan import Plan
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Op, Site
from effattn.lowering.forms import FORMS
from effattn.lowering.forms.exact import kernel_of
from effattn.lowering.forms.form import Params
from effattn.passes.candidate.failures import left_alone
from effattn.passes.candidate.record import Match
from effattn.passes.choose.cheapest import cheapest
from effattn.passes.choose.record import Choice, Considered
from effattn.passes.choose.routes import EXACT, exact_route, plan_of
from effattn.passes.choose.trained import no_weights
from effattn.passes.compilation import Compilation, Pass
from effattn.policy import Policy
from effattn.policy import Rule as PolicyRule
from effattn.runtime.targets.choice import why_not_there

NO_SOFTMAX = Refusal(
    Why.NO_SOFTMAX,
    "the graph spells linear attention, and a form stands for a softmax",
    "let the rule name other layers",
)


class ChooseForms(Pass):
    """Chooses a form and a route for every match."""

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
    """The choice for one match.

    Raises:
        FormRefused: with ``strict``, a form of the policy does not apply at a site that its rule matches.
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
        reason = f"policy {policy.name!r} asks for it{since}{_counted_from(plan)}"
        return Choice(match, name, params, "op", reason, plan, tuple(considered))
    return _exact(match, tuple(considered), "; ".join([*_refused(considered), *found.notes]), rule, target)


# by the dimensions of the tensor of first keys
COUNTED = {
    1: "; distances and sinks are counted from the first key after padding",
    2: "; distances and sinks are counted from the first key that each query may see",
}


def _counted_from(plan: Plan | None) -> str:
    """Where a form begins to count, for the report."""
    spec = None if plan is None else plan.spec.complete
    found = () if spec is None else [load.ndim for load in spec.captures if load.name == FIRST_KEY]
    return COUNTED[found[0]] if found else ""


def _considered(site: Site, name: str, params: Params, strict: bool, min_length: int = 0) -> Considered:
    """Whether a form applies at a site.

    Raises:
        FormRefused: with ``strict``, it does not.
    """
    keys = site.layout.fixed_keys
    if not FORMS[name].softmax and keys is not None and keys < min_length:  # its op cannot depend on the length
        reason = f"this graph has {keys:,} keys, and min_length is {min_length:,}"
        return Considered(name, False, (Refusal(Why.SHORT, reason),))
    if site.op is Op.SOFTMAX:
        refusals = FORMS[name].refusals(site, params)
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
    length = max(rule.min_length, 1)  # the form is decided when the op runs
    considered = [_considered(site, name, rule.params_of(name), strict, length) for name in rule.preference]
    accepted = [one.form for one in considered if one.accepted]
    dense = exact_route(site, match.nodes, kernel_of(rule.params_of("exact")), target).route != "op"
    also: list[str] = []  # why a form with its own op was not chosen
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
        return _exact(match, tuple(considered), "; ".join(why), rule, target)
    plan: Plan | None = None
    for first, name in steps:
        params = rule.params_of(name)
        more = plan_of(site, name, params, first if plan is not None else 0, target)
        plan = more.dispatched(below=plan)
    form = steps[-1][1]
    reason = f"policy {policy.name!r} asks for the cheapest: {found.text(steps)}{_counted_from(plan)}"
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
    """A form with its own op, if it is cheapest at this graph's one length; otherwise the reason why not."""
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


def _exact(
    match: Match, considered: tuple[Considered, ...], why: str, rule: PolicyRule | None, target: str | None
) -> Choice:
    site = match.site
    params = FORMS["exact"].params() if rule is None else rule.params_of("exact")
    routed = EXACT[site.op](site, match.nodes, kernel_of(params), target)
    plan = plan_of(site, "exact", params, 0, target) if routed.route == "op" else None
    reason = f"{routed.reason}; {why}" if why else routed.reason
    return Choice(match, "exact", params, routed.route, reason, plan, considered, target)

"""The effect of a policy: how many attentions its rules reach, and why not more.

Warns once per compiled model, and only of unintended effects: a refused form, a rule that matches nothing, a policy
without any effect.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx

from effattn.errors import PolicyError
from effattn.ir.refusal import Refusal, Why
from effattn.ir.site import Site
from effattn.passes.choose.record import Choice
from effattn.policy import Policy, Rule
from effattn.policy.layers import read
from effattn.versions import graph_being_made

UNKNOWN = "which {} an attention is in is not known here; compile the whole model instead of parts of it"


@dataclass(frozen=True)
class Reached:
    """One attention, the rule for it, and why none of the rule's forms applies, if so."""

    site: Site
    rule: int | None
    refusal: Refusal | None

    @staticmethod
    def of(choice: Choice, policy: Policy) -> Reached:
        named = [one for one in choice.considered if one.form != "exact"]
        refusals = [refusal for one in named if not one.accepted for refusal in one.refusals[:1]]
        planned = len(refusals) < len(named) or any(refusal.rule == Why.SHORT for refusal in refusals)
        site = choice.match.site
        return Reached(site, policy.match(site).index, refusals[0] if refusals and not planned else None)


def shortcomings(policy: Policy, reached: Sequence[Reached], *, whole: bool) -> list[str]:
    """What the policy asks for and does not get, each with a hint; [] if there is nothing.

    ``whole``: ``reached`` has all attentions of a model. Only then is a rule without a match reported.
    """
    if not reached:
        return []
    found = _refused(policy, reached) + _beyond(policy, reached)
    if whole:
        found = found + _without_a_match(policy, reached) or _other_stages(policy, reached)
    return found


def _refused(policy: Policy, reached: Sequence[Reached]) -> list[str]:
    """A message for each rule that has sites at which none of its forms applies."""
    texts = []
    for index, rule in enumerate(policy.rules):
        asked = [one for one in reached if one.rule == index]
        reasons = Counter((one.refusal.reason, one.refusal.hint) for one in asked if one.refusal is not None)
        if reasons:
            forms, applied = rule.preference[:-1], len(asked) - reasons.total()
            verb = "applies" if len(forms) == 1 else "apply"
            counted = "; ".join(
                f"at {count} {reason}" + (f" ({hint})" if hint else "") for (reason, hint), count in reasons.items()
            )
            texts.append(
                f"{_name(policy, index)}{' and '.join(forms)} {verb} to {applied} of {_sites(asked)}: {counted}"
            )
    return texts


def _beyond(policy: Policy, reached: Sequence[Reached]) -> list[str]:
    try:
        policy.check_sites(one.site for one in reached)
    except PolicyError as error:
        return [str(error)]
    return []


def _without_a_match(policy: Policy, reached: Sequence[Reached]) -> list[str]:
    """Rules that match no attention by ``model``, ``site`` or ``layers``."""
    sites = [one.site for one in reached]
    texts: list[str] = []
    for_models = [rule for rule in policy.rules if rule.model]
    if for_models and not any(rule.matches_model(site.module_classes) for rule in for_models for site in sites):
        names = _some(glob for rule in for_models for glob in rule.model)
        classes = _some(name for site in sites for name in site.module_classes) or "none"
        texts.append(
            f"model {names} matches nothing: the modules around attention here are {classes}; name one of these, or "
            "compile the whole model"
        )
    for index, rule in enumerate(policy.rules):
        inside = [site for site in sites if rule.matches_model(site.module_classes)]
        placed = [site for site in inside if rule.matches_place(site)]
        if inside and not placed:
            paths = _some(site.path for site in inside)
            why = f"attention here is in {paths}" if paths else UNKNOWN.format("module")
            texts.append(f"{_name(policy, index)}site {_some(rule.site)} matches nothing: {why}")
        elif placed and rule.layer_ranges is not None:
            texts += [_name(policy, index) + why for why in _no_layer(rule, placed)]
    return texts


def _no_layer(rule: Rule, sites: Sequence[Site]) -> list[str]:
    assert rule.layer_ranges is not None
    if rule.layer_ranges.period is not None:  # valid for models of any depth
        return []
    layers = sorted({site.layer for site in sites if site.layer is not None})
    if not layers:
        return [f"layers {rule.layers} match nothing: {UNKNOWN.format('layer')}"]
    told = any(rule.layer_ranges.beyond(site.layer_count) for site in sites if site.layer_count is not None)
    if told or any(layer in rule.layer_ranges for layer in layers):
        return []
    return [f"layers {rule.layers} match nothing: attention here is in layers {read(layers)}"]


def _other_stages(policy: Policy, reached: Sequence[Reached]) -> list[str]:
    """A policy whose rules are all for other stages."""
    rules = [rule for rule in policy.rules if rule.preference != ("exact",)]
    if any(policy.rules[one.rule] in rules for one in reached if one.rule is not None):
        return []
    missed = [one for one in reached for rule in rules if rule.matches_place(one.site) and _in_layers(rule, one.site)]
    if not missed:
        return []
    stages = sorted({one.site.stage for one in missed})
    wanted = _some(stage for rule in rules for stage in rule.stage)
    hint = "; run under torch.no_grad(), unless this is training" if "train" in stages else ""
    forms = " and ".join(dict.fromkeys(form for rule in rules for form in rule.preference[:-1]))
    return [f"{forms} at 0 of {_sites(reached)}: stage {' and '.join(stages)}, and the policy is for {wanted}{hint}"]


def _in_layers(rule: Rule, site: Site) -> bool:
    return rule.layer_ranges is None or (site.layer is not None and site.layer in rule.layer_ranges)


def _name(policy: Policy, index: int) -> str:
    return f"rule[{index}]: " if len(policy.rules) > 1 else ""


def _sites(reached: Sequence[Reached]) -> str:
    return f"{len(reached)} site" + ("s" if len(reached) != 1 else "")


def _some(names: Iterable[str], most: int = 4) -> str:
    """The first few distinct names."""
    different = list(dict.fromkeys(name for name in names if name))
    return ", ".join(different[:most]) + (", ..." if len(different) > most else "")


# --- warning ------------------------------------------------------------------------------------------------------


@dataclass
class _Model:
    """State of one ``torch.compile``: all its graphs, between graph breaks, for prefill and decode, and recompiled."""

    reached: dict[tuple[str, str, str], Reached] = field(default_factory=dict)
    told: bool = False


_models: WeakKeyDictionary[Any, _Model] = WeakKeyDictionary()


def warn_once(gm: fx.GraphModule, choices: Sequence[Choice], policy: Policy) -> None:
    """Warn of shortcomings once per compiled model."""
    if not policy.rules or not choices:
        return
    owner, whole = _compiled_by(gm)
    model = _models.setdefault(owner, _Model())
    if model.told:
        return
    for choice in choices:
        site = choice.match.site
        model.reached[site.path, site.name, site.stage] = Reached.of(choice, policy)
    if texts := shortcomings(policy, list(model.reached.values()), whole=whole):
        model.told = True
        model.reached.clear()
        warnings.warn(f"effattn, policy {policy.name!r}: {'; '.join(texts)}", stacklevel=3)


def _compiled_by(gm: fx.GraphModule) -> tuple[Any, bool]:
    """(an object shared by all graphs of one ``torch.compile``, whether the model ends with this graph)."""
    broken = getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False)
    made = graph_being_made()
    return (gm if made is None else made.compiler_fn), not broken

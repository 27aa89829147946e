"""From what the passes did to the records of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from effattn.compiler.options import Options
from effattn.compiler.report.effect import Reached, shortcomings
from effattn.compiler.report.model import Report
from effattn.compiler.report.outside import Outside
from effattn.compiler.report.records import GraphReport, MissedReport, SiteReport, ranges
from effattn.compiler.report.target import described, how_tiles_are_found
from effattn.ir.refusal import Why
from effattn.ir.site import Site
from effattn.ir.text import text
from effattn.passes.candidate.naming import renamed
from effattn.passes.choose.record import Choice
from effattn.passes.compilation import Outcome
from effattn.policy import write


def graph_report(after: str, outcome: Outcome, failure: Exception | None, before: str) -> GraphReport:
    """The report of one compiled graph."""
    return GraphReport(
        sites=tuple(map(_site, outcome.choices)),
        missed=tuple(
            MissedReport(
                missed.name,
                missed.location,
                missed.refusal.reason,
                missed.refusal.hint,
                missed.refusal.rule != Why.NOT_ATTENTION,
                str(missed.refusal.rule),
                missed.refusal.cause,
            )
            for missed in outcome.missed
        ),
        before=before,
        after=after,
        erased=outcome.erased,
        seconds=outcome.seconds,
        failure=f"{type(failure).__name__}: {failure}" if failure is not None else None,
        passes=tuple(outcome.passes),
    )


def _site(choice: Choice) -> SiteReport:
    site = choice.match.site
    return SiteReport(
        name=site.path or site.name,
        layer=site.layer,
        stage=site.stage,
        found_as=site.found_as,
        form=_own_name(site, choice.form),
        exact=choice.exact,
        here=_here(choice),
        predicate=text(site.spec.predicate),
        score=text(site.spec.score) + _without_softmax(site),
        reason=choice.reason,
        candidates=tuple(
            {"form": one.form, "accepted": one.accepted, "rules": tuple(map(str, one.rules)), "reasons": one.reasons}
            for one in choice.considered
        ),
        kernel=described(choice),
        tiles=how_tiles_are_found(choice),
        location=site.location,
        layout=str(site.layout),
        empty_rows=site.spec.empty_rows,
        notes=site.notes,
        params=choice.params.shown(),
        path=site.path,
        replaced=choice.route != "keep",
        **_shown(site),
    )


def _here(choice: Choice) -> str:
    """The form at the length for which the graph was compiled."""
    site, plan = choice.match.site, choice.plan
    return _own_name(site, choice.form if plan is None or not site.hints.k_len else plan.at(site.hints.k_len).form)


def _own_name(site: Site, form: str) -> str:
    """The form's name; "linear" for the user's own linear attention."""
    return form if site.linear is None else "linear"


def _without_softmax(site: Site) -> str:
    """How weights are computed without a softmax; "" if there is one."""
    if site.linear is None:
        return ""
    eps = f" + {site.linear.eps:g}" if site.linear.eps else ""
    return ", no softmax" + (f", each row divided by its sum{eps}" if site.linear.normalised else "")


def _shown(site: Site) -> dict[str, Any]:
    names = dict(zip((load.name for load in site.spec.captures), site.reads, strict=True))
    predicate, score = (text(renamed(term, names, {})) for term in (site.spec.predicate, site.spec.score))
    return {"reads": names, "predicate_shown": predicate, "score_shown": score + _without_softmax(site)}


def stanza(choices: list[Choice], policy: str) -> str:
    """A policy file that repeats these choices."""
    groups: dict[tuple, list[Choice]] = {}
    for choice in choices:
        if choice.form != "exact" or choice.params.shown():
            key = (
                choice.form,
                choice.match.site.stage,
                str(choice.params),
                choice.plan.dispatch.min_length if choice.plan else 0,
            )
            groups.setdefault(key, []).append(choice)
    rules: list[dict[str, Any]] = []
    for (form, stage, _, min_length), members in groups.items():
        layers = sorted({choice.match.site.layer for choice in members if choice.match.site.layer is not None})
        rule: dict[str, Any] = {"layers": ranges(layers)} if layers else {}
        rule |= {"stage": [stage], **({"min_length": min_length} if min_length else {}), "forms": [form]}
        params = members[0].params.shown()
        rules.append({**rule, **({"params": {form: params}} if params else {})})
    return write.policy({"schema": 1, "name": f"{policy}-as-chosen", "rule": rules})


def merge(
    graphs: list[GraphReport], choices: list[Choice], options: Options, outside: Sequence[Outside] = ()
) -> Report:
    """One report for all graphs of a model."""
    return Report(
        graphs=graphs,
        policy=options.policy.name,
        policy_toml=options.policy.to_toml(),
        stanza=stanza(choices, options.policy.name),
        outside=tuple(outside),
        shortcomings=tuple(
            shortcomings(options.policy, [Reached.of(one, options.policy) for one in choices], whole=True)
        ),
    )

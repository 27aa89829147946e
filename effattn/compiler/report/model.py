"""The report on every attention of a model as plain data. Text and HTML are views of it."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from effattn.compiler.options import Options
from effattn.compiler.report.effect import Reached, shortcomings
from effattn.compiler.report.outside import Outside
from effattn.compiler.report.target import described
from effattn.ir.refusal import Why
from effattn.ir.site import Site
from effattn.ir.text import text
from effattn.passes.candidate.naming import renamed
from effattn.passes.choose.record import Choice
from effattn.passes.compilation import Outcome, PassRecord
from effattn.policy import write


@dataclass(frozen=True)
class SiteReport:
    """One attention that was found."""

    name: str
    layer: int | None
    stage: str
    found_as: str
    form: str
    exact: bool
    here: str  # the form at the length of this call; exact below a policy's min_length
    predicate: str
    score: str
    reason: str
    candidates: tuple[dict[str, Any], ...]
    kernel: str | None  # path of the generated kernel, or what runs instead
    location: str
    layout: str
    empty_rows: str
    notes: tuple[str, ...]
    params: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # of its module, as in named_modules()
    replaced: bool = True  # False: user code runs, and ``reason`` says why
    reads: dict[str, str] = field(default_factory=dict)  # captured tensor to its name in user code
    predicate_shown: str = ""  # with the names in user code: attention_mask[b, k] for padding[b, k]
    score_shown: str = ""
    rules: tuple[str, ...] = ()  # of effattn.ir.refusal.Why: those that keep exact attention from being replaced


@dataclass(frozen=True)
class Counts:
    """Numbers of attentions by outcome; ``total`` is found + missed + outside."""

    found: int  # with an expression for score and mask
    replaced: int  # of those found
    missed: int  # not understood, or not replaceable; each has a reason
    outside: int  # calls that ran eagerly

    @property
    def total(self) -> int:
        return self.found + self.missed + self.outside

    @property
    def left_alone(self) -> int:
        """Attentions in compiled graphs that run as user code: missed, or found and not replaced."""
        return self.found - self.replaced + self.missed


@dataclass(frozen=True)
class MissedReport:
    """A softmax or SDPA call that was left alone."""

    name: str
    location: str
    reason: str
    hint: str = ""
    attention: bool = True  # False: a softmax of something else, as in a router
    rule: str = ""  # a value of effattn.ir.refusal.Why
    cause: str = ""  # "file:line: code" of the operation named in the reason


@dataclass
class GraphReport:
    """One graph of the model."""

    sites: tuple[SiteReport, ...]
    missed: tuple[MissedReport, ...]
    before: str
    after: str
    erased: int
    seconds: dict[str, float]
    failure: str | None
    passes: tuple[PassRecord, ...] = ()  # in order of execution
    calls: int = 0  # in the explained call: layers of a loop with a graph break share one graph

    def ran(self) -> None:
        self.calls += 1


@dataclass
class Report:
    """The report on one model; graphs are in the order of compilation."""

    graphs: list[GraphReport]
    policy: str
    policy_toml: str
    stanza: str
    shortcomings: tuple[str, ...] = ()  # what the policy asks for and does not get, each with a hint
    outside: tuple[Outside, ...] = ()  # attention that ran eagerly, in no graph

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def missed(self) -> list[MissedReport]:
        return [missed for graph in self.graphs for missed in graph.missed]

    @property
    def counts(self) -> Counts:
        return Counts(
            found=len(self.sites),
            replaced=sum(site.replaced for site in self.sites),
            missed=sum(missed.attention for missed in self.missed),
            outside=sum(one.calls for one in self.outside),
        )

    @property
    def seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for graph in self.graphs:
            total.update(graph.seconds)
        return dict(total)

    def graph(self, before: bool = False, number: int = 0) -> str:
        """The code of graph ``number``, as Dynamo made it (``before``) or rewritten."""
        if not 0 <= number < len(self.graphs):
            raise IndexError(f"the model has {len(self.graphs)} graphs, there is no graph {number}")
        return self.graphs[number].before if before else self.graphs[number].after

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "versions": versions(),
            "policy": {"name": self.policy, "toml": self.policy_toml, "shortcomings": list(self.shortcomings)},
            "seconds": self.seconds,
            "counts": asdict(self.counts) | {"total": self.counts.total, "left_alone": self.counts.left_alone},
            "sites": [asdict(site) for site in self.sites],
            "missed": [asdict(missed) for missed in self.missed],
            "outside": [asdict(outside) for outside in self.outside],
            "graphs": [
                {
                    "before": graph.before,
                    "after": graph.after,
                    "erased": graph.erased,
                    "failure": graph.failure,
                    "calls": graph.calls,
                    "passes": [asdict(record) for record in graph.passes],
                }
                for graph in self.graphs
            ],
            "stanza": self.stanza,
        }

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML page and return its path."""
        from effattn.compiler.report.html import render

        path = Path(path)
        path.write_text(render(self.to_dict()), encoding="utf-8")
        return path

    def __str__(self) -> str:
        from effattn.compiler.report.text import render

        return render(self)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("effattn", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


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
        rules=tuple(str(refusal.rule) for refusal in choice.refusals),
        candidates=tuple(
            {"form": one.form, "accepted": one.accepted, "rules": tuple(map(str, one.rules)), "reasons": one.reasons}
            for one in choice.considered
        ),
        kernel=described(choice),
        location=site.location,
        layout=str(site.layout),
        empty_rows=site.spec.empty_rows,
        notes=site.notes,
        params=choice.params.model_dump(),
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
        if choice.form != "exact":
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
        params = members[0].params.model_dump()
        rules.append({**rule, **({"params": {form: params}} if params else {})})
    return write.policy({"schema": 1, "name": f"{policy}-as-chosen", "rule": rules})


def ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1:] = [parts[-1][0], number] if len(parts[-1]) == 1 else [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


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


__all__ = ["GraphReport", "MissedReport", "Report", "SiteReport", "graph_report", "merge"]

"""Collects reports of compilations for ``explain``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import fx

from effattn import settings
from effattn.compiler.options import Options
from effattn.compiler.report.build import graph_report, merge
from effattn.compiler.report.model import Report
from effattn.compiler.report.outside import Outside
from effattn.compiler.report.records import GraphReport
from effattn.passes.choose.record import Choice
from effattn.passes.compilation import Outcome


@dataclass
class Collected:
    """The graphs and choices collected in one context."""

    graphs: list[GraphReport] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def report(self, options: Options, outside: Sequence[Outside] = ()) -> Report:
        return merge(self.graphs, self.choices, options, outside)


# per thread, so that compilations in other threads are not collected
_listeners: ContextVar[tuple[Collected, ...]] = ContextVar("effattn_listeners", default=())


@contextmanager
def listening() -> Iterator[Collected]:
    """Collect a report of every graph that this thread compiles in the context."""
    events = Collected()
    before = _listeners.set((*_listeners.get(), events))
    try:
        yield events
    finally:
        _listeners.reset(before)


def is_collecting() -> bool:
    """Whether this thread is collecting."""
    return bool(_listeners.get())


def emit(gm: fx.GraphModule, outcome: Outcome, options: Options, failure: Exception | None) -> None:
    """Report one compiled graph to all listeners, and log it according to EFFATTN_DEBUG."""
    debug = settings.current().debug
    if debug.passes:
        for record in outcome.passes:
            settings.log("\n".join([str(record), *record.difference.splitlines()]))
    if not (listeners := _listeners.get()) and not debug.level:
        return
    after = str(gm.code)
    before = fx.GraphModule(gm, outcome.original).code if outcome.original is not None else after
    report = graph_report(after, outcome, failure, before)
    for events in listeners:
        events.graphs.append(report)
        events.choices += outcome.choices
    if debug.level and (report.sites or report.missed):
        _show(report, options)


def _show(report: GraphReport, options: Options) -> None:
    for site in report.sites:
        settings.show(1, f"{site.name}: {site.predicate_shown or site.predicate} -> {site.form}")
        settings.show(2, f"{site.name}: {site.reason}")
    for missed in report.missed:
        settings.show(1, f"{missed.name}: left alone, {missed.reason}")
    settings.show(3, f"before:\n{report.before}\nafter:\n{report.after}")

"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2


def render(report: Mapping[str, Any]) -> str:
    """The page for ``Report.to_dict()``. Every value is escaped; missing keys are left blank."""
    sites = list(report.get("sites", ()))
    return _template().render(
        report=report,
        sites=sites,
        groups=_groups(sites),
        missed=list(report.get("missed", ())),
        outside=list(report.get("outside", ())),
        ran_outside=sum(one.get("calls", 1) for one in report.get("outside", ())),
        found=len(sites),
        replaced=sum(site.get("replaced", True) for site in sites),
        left=sum(missed.get("attention", True) for missed in report.get("missed", ())),
        approximate=sum(not site.get("exact", True) for site in sites),
        refused=[site for site in sites if any(not c.get("accepted") for c in site.get("candidates", ()))],
        graphs=[graph for graph in report.get("graphs", ()) if graph],
    )


def _groups(sites: list[Mapping[str, Any]]) -> list[tuple[str, str, str, int]]:
    """Counts of (form, stage, predicate), for the summary."""
    counts: dict[tuple[str, str, str], int] = {}
    for site in sites:
        key = (str(site.get("form", "")), str(site.get("stage", "")), str(site.get("predicate", "")))
        counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in counts.items()]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, jinja2.Undefined):
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(str(part) for part in value)
    return str(value)


def _seconds(value: Any) -> str:
    return f"{value:.3g} s" if isinstance(value, (int, float)) else _shown(value)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("effattn", "compiler/report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(shown=_shown, seconds=_seconds)
    return environment.get_template("report.html.jinja")

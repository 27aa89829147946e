"""The report for a terminal: like sites on one line, reasons below."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.compiler.report import Report, SiteReport


def render(report: Report) -> str:
    """The whole report as text."""
    found = len(report.sites)
    total = found + sum(miss.attention for miss in report.missed)
    lines = [f"effattn: {found} of {total} attention sites found, policy {report.policy!r}"]
    if not report.graphs:
        lines = ["effattn: torch.compile made no graph of this call (TORCH_LOGS=graph_breaks tells why)"]
    elif not total and any(graph.failure for graph in report.graphs):
        lines = ["effattn: no attention was replaced, because of an error"]
    elif not total:
        lines = ["effattn: no attention found in this model"]
    for members in _alike(report):
        first = members[0]
        lines.append("")
        lines.append(f"  {_layers(members)}  {first.stage}, found as {first.found_as}, {first.layout}")
        lines.append(f"    predicate  {first.predicate}")
        lines.append(f"    score      {first.score}")
        params = ", ".join(f"{name} {value}" for name, value in first.params.items())
        kind = "" if first.exact else ", not exact"
        lines.append(f"    form       {first.form}{f' ({params})' if params else ''}{kind}: {first.reason}")
        if first.kernel:
            lines.append(f"    runs       {first.kernel}")
        for candidate in first.candidates:
            if not candidate["accepted"]:
                lines.append(f"    refused    {candidate['form']}: {'; '.join(candidate['reasons'])}")
        lines += [f"    note       {note}" for note in first.notes]
        if first.location:
            lines.append(f"    at         {first.location}")
    for miss in report.missed:
        hint = f" ({miss.hint})" if miss.hint else ""
        lines += ["", f"  left alone: {miss.name}: {miss.reason}{hint}", f"    at         {miss.location}"]
    for number, graph in enumerate(report.graphs):
        if graph.failure:
            lines += ["", f"  graph {number} was left as it was: {graph.failure}"]
    seconds = report.seconds
    if "passes" in seconds:
        lines += [
            "",
            f"  passes took {seconds['passes']:.2f} s, the rest of the compilation {seconds.get('rest', 0):.2f} s",
        ]
    return "\n".join(lines)


def _alike(report: Report) -> list[list[SiteReport]]:
    """Sites that differ in layer only, together."""
    groups: dict[tuple, list[SiteReport]] = {}
    for graph_number, graph in enumerate(report.graphs):
        for site in graph.sites:
            key = (graph_number, site.stage, site.found_as, site.layout, site.predicate, site.score, site.form)
            groups.setdefault((*key, site.reason, site.kernel, str(site.params), site.notes), []).append(site)
    return list(groups.values())


def _layers(sites: list[SiteReport]) -> str:
    from effattn.compiler.report import ranges

    if len(sites) == 1:
        return sites[0].name
    layers = [site.layer for site in sites]
    if None in layers or len(set(layers)) < len(layers):
        return f"{sites[0].name} and {len(sites) - 1} more"
    return f"layers {ranges(sorted(layer for layer in layers if layer is not None))} ({len(sites)} sites)"

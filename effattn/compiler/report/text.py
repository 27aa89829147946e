"""The report as text: sites that differ only by layer on one line, with reasons below."""

from __future__ import annotations

from effattn.compiler.report.records import Contents, SiteReport, ranges


def render(report: Contents) -> str:
    """The whole report."""
    counts = report.counts
    outside, total = counts.outside, counts.total
    left = f", {counts.left_alone} left alone" if counts.left_alone else ""
    done = f"{counts.found} of {total} attention sites found, {counts.replaced} replaced{left}"
    lines = [f"effattn: {done}, policy {report.policy!r}"]
    if not report.graphs:
        tells = "" if outside else " (TORCH_LOGS=graph_breaks shows why)"
        lines = [f"effattn: torch.compile made no graph of this call{tells}"]
    elif not total and any(graph.failure for graph in report.graphs):
        lines = ["effattn: no attention was replaced, because of an error"]
    elif not total:
        lines = ["effattn: no attention found in this model"]
    if outside:
        lines[0] += f"; {outside} ran outside compiled graphs"
    lines += [f"  policy     {text}" for text in report.shortcomings]
    for members, calls in _alike(report):
        first = members[0]
        lines.append("")
        lines.append(f"  {_layers(members)}  {first.stage}, found as {first.found_as}, {first.layout}")
        lines.append(f"    predicate  {first.predicate_shown or first.predicate}")
        lines.append(f"    score      {first.score_shown or first.score}")
        params = ", ".join(f"{name} {value}" for name, value in first.params.items())
        kind = "" if first.exact else ", not exact" if first.here == first.form else f", {first.here} at this length"
        lines.append(f"    form       {first.form}{f' ({params})' if params else ''}{kind}: {first.reason}")
        if first.kernel:
            lines.append(f"    runs       {first.kernel}")
        if first.tiles:
            lines.append(f"    tiles      {first.tiles}")
        if calls > 1:
            lines.append(f"    calls      {calls}: calls of one graph per call of the model")
        for candidate in first.candidates:
            if not candidate["accepted"]:
                lines.append(f"    refused    {candidate['form']}: {'; '.join(candidate['reasons'])}")
        lines += [f"    note       {note}" for note in first.notes]
        if first.location:
            lines.append(f"    at         {first.location}")
    for miss in report.missed:
        hint = f" ({miss.hint})" if miss.hint else ""
        what = "left alone" if miss.attention else "not attention"
        lines += ["", f"  {what}: {miss.name}: {miss.reason}{hint}", f"    at         {miss.location}"]
        lines += [f"    because of {miss.cause}"] if miss.cause else []
    for one in report.outside:
        times = f" ({one.calls} times)" if one.calls > 1 else ""
        lines += ["", f"  outside compiled graphs: {one.called}{times}: {one.reason}"]
        lines += [f"    hint       {one.hint}"] if one.hint else []
        lines += [f"    at         {one.location}"]
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


def render_passes(report: Contents) -> str:
    """What each pass did to each graph, with code differences if they were recorded."""
    lines: list[str] = []
    for number, graph in enumerate(report.graphs):
        lines += [f"graph {number}", *[f"  {record}" for record in graph.passes], ""]
        for record in graph.passes:
            if record.difference:
                lines += [f"-- {record.name}", record.difference, ""]
    return "\n".join(lines).rstrip()


def _alike(report: Contents) -> list[tuple[list[SiteReport], int]]:
    """Groups of sites that differ only by layer, and how often their graph was called."""
    groups: dict[tuple, list[SiteReport]] = {}
    for graph_number, graph in enumerate(report.graphs):
        for site in graph.sites:
            key = (graph_number, site.stage, site.found_as, site.layout, site.predicate, site.score, site.form)
            groups.setdefault((*key, site.reason, site.kernel, str(site.params), site.notes), []).append(site)
    return [(members, report.graphs[key[0]].calls) for key, members in groups.items()]


def _layers(sites: list[SiteReport]) -> str:
    if len(sites) == 1:
        return sites[0].name
    layers = [site.layer for site in sites]
    if None in layers or len(set(layers)) < len(layers):
        return f"{sites[0].name} and {len(sites) - 1} more"
    return f"layers {ranges(sorted(layer for layer in layers if layer is not None))} ({len(sites)} sites)"
